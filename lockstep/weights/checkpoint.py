"""Opening a checkpoint of any container: its config, and its tensors under Hugging Face names."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.weights import safetensors
from lockstep.weights.brief import brief_errors
from lockstep.weights.content import ContentHash, Stamp, check_unchanged, content_hash, stamp
from lockstep.weights.folders import mistral
from lockstep.weights.folders.folder import unquantized
from lockstep.weights.gguf.architecture import Architectures
from lockstep.weights.gguf.file import is_gguf
from lockstep.weights.gguf.model import open_gguf
from lockstep.weights.mapped import descriptor_of, read_json_object
from lockstep.weights.tensor import TensorFile, TensorMap, merge

ADAPTER = "adapter_config.json"  # of PEFT; transformers loads the adapter wherever a folder has this file


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; nothing is read until a tensor is asked for.

    config: config.json (or its equivalent). tensors: Hugging Face name -> StoredTensor. metadata: of a GGUF file, with
    its tokenizer and chat template; empty for safetensors. verify: hash all weights, even if their hash is remembered.
    """

    path: Path
    config: dict
    generation_config: dict
    tensors: TensorMap
    metadata: Mapping[str, object]
    files: tuple[TensorFile, ...] = field(repr=False)
    verify: bool = False

    @functools.cached_property
    def stamps(self) -> tuple[Stamp, ...]:
        """The stamp of each weight file, from the descriptors that were opened."""
        return tuple(stamp(file.path, descriptor_of(file.raw)) for file in self.files)

    @functools.cached_property
    def content(self) -> ContentHash:
        """The hash of the weight files and the config. Files whose hash is not remembered are read from now on."""
        paths, tensors = [file.path for file in self.files], [file.infos.keys() for file in self.files]
        return ContentHash(paths, self.stamps, tensors, self.config, self.verify)

    @property
    def header_hash(self) -> str:
        """A cheap hash of the files' headers, the tensors taken from each and the config. Fine-tunes of one model may
        have the same."""
        return content_hash(
            [file.header_hash for file in self.files], [file.infos.keys() for file in self.files], self.config
        )

    @property
    def provisional_name(self) -> str:
        """The checkpoint's name until its content hash is known, made from the stamps of its files."""
        known = [*(one.name for one in self.stamps), self.header_hash]
        return hashlib.sha256(repr(known).encode()).hexdigest()[:40]

    def check_unchanged(self) -> None:
        """ValueError if a weight file has changed since it was opened."""
        for file, stamped in zip(self.files, self.stamps, strict=True):
            check_unchanged(file.path, stamped)


@brief_errors()
def open_checkpoint(path: str | Path, architectures: Architectures, *, verify: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, a .safetensors file beside its config.json, a folder of Mistral's with a params.json,
    or a .gguf file.

    architectures: those that a .gguf file may have. verify: hash all weights, even if their hash is remembered.

    Raises ValueError that names the file (and the tensor, if a tensor is wrong), what was expected and what was found.
    """
    path = Path(path)
    if is_gguf(path):
        return _open_gguf(path, architectures, verify)
    refuse_adapter(path if path.is_dir() else path.parent)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, path.parent, [safetensors.open_file(path)], verify)
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder, a .safetensors file or a .gguf file")
    stem = mistral.STEM if mistral.is_native(path) else safetensors.STEM
    return _open_safetensors(path, path, safetensors.open_folder(path, stem), verify)


def _open_safetensors(path: Path, folder: Path, files: list[TensorFile], verify: bool) -> Checkpoint:
    generation, is_native = folder / "generation_config.json", mistral.is_native(folder)
    config = {} if is_native else read_json_object(folder / "config.json")
    try:
        tensors = merge(files)
        config, tensors = mistral.open_native(folder, tensors) if is_native else (config, unquantized(config, tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Checkpoint(
        path=path,
        config=config,
        generation_config=read_json_object(generation) if generation.is_file() else {},
        tensors=tensors,
        metadata={},
        files=tuple(files),
        verify=verify,
    )


def refuse_adapter(folder: Path) -> None:
    """ValueError for a folder with an adapter, which would change what the weights beside it compute."""
    path = folder / ADAPTER
    if path.is_file():
        about = read_json_object(path)
        kind, base = (about.get(key) for key in ("peft_type", "base_model_name_or_path"))
        raise ValueError(
            f"{path}: adapters are not supported, got one of type {kind!r} for {base!r}: merge it into its base model"
        )


def _open_gguf(path: Path, architectures: Architectures, verify: bool) -> Checkpoint:
    parts, config, tensors = open_gguf(path, architectures)
    token_ids = ("bos_token_id", "eos_token_id")
    generation = {key: config[key] for key in token_ids if key in config}
    return Checkpoint(path, config, generation, tensors, parts[0].metadata, tuple(parts), verify)
