"""Ollama's store: manifests name the layers of a model, blobs are the layers; that of the weights is a GGUF file.

A manifest is untrusted: what it names has to be a digest, and its blob a file inside of the store. Source: the package
documentation of Ollama's manifests (server/internal/manifest in github.com/ollama/ollama).
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.weights.mapped import parse_json_object
from lockstep.weights.sources.found import FoundModel, NotFound, OnError, entries, file_bytes

PREFIX = "ollama:"
VARIABLE = "OLLAMA_MODELS"
USUAL = ("~/.ollama/models", "/usr/share/ollama/.ollama/models")  # of a user, of the service
MANIFESTS = ("manifests-v2", "manifests")
LIBRARY, LATEST, OWN_HOST = "library", "latest", "registry."  # left out of names, as Ollama does
PART = re.compile(r"\w[\w.-]*")  # of a name: host, namespace, model or tag
DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
MODEL = "application/vnd.ollama.image.model"
KINDS = {  # other layers that change what a model computes
    "application/vnd.ollama.image.adapter": "an adapter (LoRA)",
    "application/vnd.ollama.image.tensor": "tensors in files of their own",
}
MAX_MANIFEST_BYTES = 4 << 20


class Damaged(ValueError):
    """Something is wrong with a model in a store. reason: in words, without the model's name and the file."""

    def __init__(self, name: str, reason: str, path: Path) -> None:
        super().__init__(f"{name}: {reason} ({path})")
        self.reason = reason


@dataclass(frozen=True)
class Manifest:
    """A manifest in a store: <store>/manifests/<host>/<namespace>/<model>/<tag>."""

    store: Path
    path: Path

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """(host, namespace, model, tag)."""
        host, namespace, model, tag = self.path.parts[-4:]
        return host, namespace, model, tag

    @property
    def name(self) -> str:
        """The name as `ollama list` shows it."""
        host, namespace, model, tag = self.parts
        if not host.startswith(OWN_HOST):
            return f"{host}/{namespace}/{model}:{tag}"
        return f"{model}:{tag}" if namespace == LIBRARY else f"{namespace}/{model}:{tag}"

    def answers_to(self, wanted: str) -> bool:
        """Whether a name, in upper or lower case, means this manifest. A tag that is left out is LATEST."""
        name, _, tag = wanted.lower().partition(":")
        own = tuple(part.lower() for part in self.parts)
        given = name.split("/")
        expected = [*own[:3]] if len(given) == 3 else [*own[1:3]] if len(given) == 2 else [own[2]]
        in_library = len(given) > 1 or own[1] == LIBRARY
        return given == expected and in_library and (tag or LATEST) == own[3]


def stores() -> list[Path]:
    """The folders where Ollama keeps models: that of its environment variable or of this user, and of the service."""
    usual, of_service = USUAL
    return [Path(os.path.expanduser(os.environ.get(VARIABLE) or usual)), Path(of_service)]


def manifests(on_error: OnError) -> Iterator[Manifest]:
    """All manifests of all stores."""
    for store in stores():
        paths = [store / kind for kind in MANIFESTS]
        for _ in ("host", "namespace", "model", "tag"):
            paths = [inside for path in paths for inside in entries(path, on_error)]
        yield from (Manifest(store, path) for path in paths)


def resolve(name: str) -> Path:
    """The GGUF file of "ollama:NAME[:TAG]". ValueError if there is none, or something is wrong with it."""
    wanted = name.removeprefix(PREFIX)
    if not all(map(PART.fullmatch, re.split("[/:]", wanted))) or wanted.count("/") > 2 or wanted.count(":") > 1:
        raise ValueError(f"{name}: expected ollama:NAME, ollama:NAME:TAG or ollama:NAMESPACE/NAME:TAG")
    unread: list[OSError] = []
    known = list(manifests(unread.append))
    found = [manifest for manifest in known if manifest.answers_to(wanted)]
    found = [manifest for manifest in found if manifest.name == wanted] or found
    if found:
        return blob_of(found[0])
    model = wanted.partition(":")[0].lower()
    tags = [PREFIX + each.name for each in known if each.name.lower().startswith(f"{model}:")]
    there = ", ".join(tags) or f"none of that name (folders {' and '.join(map(str, stores()))})"
    unreadable = "".join(f"; {error.filename} cannot be read: {error.strerror}" for error in unread)
    raise NotFound(f"{name}: no such model in Ollama's store; there is {there}{unreadable}")


def blob_of(manifest: Manifest) -> Path:
    """The GGUF file that a manifest names. Damaged if the manifest is wrong, or the file missing or cut."""
    name, blobs = f"{PREFIX}{manifest.name}", manifest.store / "blobs"
    layer = _model_layer(manifest, name)
    digest = DIGEST.fullmatch(str(layer.get("digest")))
    if digest is None:
        raise Damaged(name, f"its manifest names no digest, sha256:..., but {layer.get('digest')!r:.80}", manifest.path)
    named = [blobs / f"sha256{mark}{digest[1]}" for mark in "-:"]
    blob = next((path for path in named if path.is_file()), None)
    if blob is None:
        raise Damaged(name, "its weights are missing: pull the model again", named[0])
    _check_inside(blob, blobs, name)
    num_bytes, expected = blob.stat().st_size, layer.get("size")
    if isinstance(expected, int) and num_bytes != expected:
        raise Damaged(name, f"its weights have {num_bytes} bytes, not {expected}: pull the model again", blob)
    return blob


def _model_layer(manifest: Manifest, name: str) -> dict:
    """The layer of a manifest that is its weights."""
    layers = read_manifest(manifest, name).get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise Damaged(name, "its manifest has no list of layers", manifest.path)
    kinds = [str(layer.get("mediaType")).partition(";")[0] for layer in layers]
    strange = next((text for kind, text in KINDS.items() if kind in kinds), None)
    if strange is not None:
        raise Damaged(name, f"it has {strange}: only weights in one GGUF file are supported", manifest.path)
    models = [layer for layer, kind in zip(layers, kinds, strict=True) if kind == MODEL]
    if len(models) != 1:
        found = "no weights: it runs elsewhere" if not models else f"{len(models)} files of weights, not one"
        raise Damaged(name, f"it has {found}", manifest.path)
    return models[0]


def read_manifest(manifest: Manifest, name: str) -> dict:
    """The JSON object in a manifest, which has to lie in its store."""
    path = manifest.path
    _check_inside(path, path.parents[3], name)
    if not path.is_file():
        raise Damaged(name, "its manifest is no file", path)
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise Damaged(name, f"its manifest has {size} bytes, at most {MAX_MANIFEST_BYTES} are allowed", path)
    try:
        return parse_json_object(path.read_bytes(), "its manifest")
    except ValueError as error:
        raise Damaged(name, str(error), path) from None


def _check_inside(path: Path, folder: Path, name: str) -> None:
    """Damaged for a file that a link leads out of its folder."""
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise Damaged(name, f"it leads out of Ollama's store, to {real}; name that file itself to use it", path)


def found(on_error: OnError) -> Iterator[FoundModel]:
    """The models of all stores."""
    for manifest in manifests(on_error):
        name = f"{PREFIX}{manifest.name}"
        try:
            blob = blob_of(manifest)
            yield FoundModel(name, blob, file_bytes(blob))
        except Damaged as error:
            yield FoundModel(name, manifest.path, problem=error.reason)
        except OSError as error:
            yield FoundModel(name, manifest.path, problem=f"{error.filename}: {error.strerror}")
