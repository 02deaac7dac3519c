"""The cache of the Hugging Face hub's client: models--org--name/ with refs, snapshots of commits, and blobs."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lockstep.weights.content import hub_cache
from lockstep.weights.sources import quants
from lockstep.weights.sources.found import FoundModel, OnError, entries, file_bytes, files_below

FOLDER = "models--"
MAIN = "main"
MAX_COMMIT_CHARS = 100


def repositories(on_error: OnError) -> dict[str, Path]:
    """{repository such as org/model: its folder in the cache}."""
    folders = [path for path in entries(hub_cache(), on_error) if path.name.startswith(FOLDER) and os.path.isdir(path)]
    return {path.name.removeprefix(FOLDER).replace("--", "/"): path for path in folders}


def snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of a repository's revision in the cache; None where the cache does not have it."""
    folder = repositories(lambda error: None).get(repo)
    if folder is None:
        return None
    commit = _refs(folder).get(revision or MAIN, revision)
    found = folder / "snapshots" / commit if commit else None
    return found if found is not None and found.parent == folder / "snapshots" and found.is_dir() else None


def _refs(folder: Path) -> Mapping[str, str]:
    """{branch, tag or other ref: its commit}, the main branch first, without those that cannot be read."""
    refs: dict[str, str] = {}
    for file in sorted(files_below(folder / "refs", max_depth=4), key=lambda file: file != MAIN):
        with contextlib.suppress(OSError, UnicodeDecodeError), open(folder / "refs" / file, encoding="ascii") as ref:
            refs[file] = ref.read(MAX_COMMIT_CHARS).strip()
    return refs


def found(on_error: OnError) -> Iterator[FoundModel]:
    """The models in the cache: each snapshot's safetensors, and each of its GGUF files."""
    for repo, folder in repositories(on_error).items():
        names = {commit: ref for ref, commit in reversed([*_refs(folder).items()])}
        for commit in entries(folder / "snapshots", on_error):
            yield from _in_snapshot(repo, names.get(commit.name, commit.name), commit)


def _in_snapshot(repo: str, revision: str, folder: Path) -> Iterator[FoundModel]:
    at, files = "" if revision == MAIN else f"@{revision}", files_below(folder)
    name = repo + at if "/" in repo else str(folder)  # models of the hub's first days have no organization
    if weights := [folder / file for file in files if file.endswith(".safetensors") and "/" not in file]:
        yield FoundModel(name, folder, file_bytes(*weights))
    tags = quants.names(quants.gguf_models(files))
    for file, tag in tags.items():
        size = file_bytes(*(folder / part for part in quants.present_parts(file, files)))
        yield FoundModel(quants.full_name(folder, file, repo, tag, at), folder / file, size)
    if not weights and not tags and "config.json" in files:
        yield FoundModel(name, folder, problem="no .safetensors and no .gguf file is here")
