"""The cache of the Hugging Face hub's client: models--org--name/ with refs, snapshots of commits, and blobs."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lockstep.weights.content import hub_cache
from lockstep.weights.sources import quants
from lockstep.weights.sources.found import FoundModel, OnError, entries, file_bytes, files_below

FOLDER = "models--"
MAIN = "main"


def repositories(on_error: OnError) -> dict[str, Path]:
    """{repository such as org/model: its folder in the cache}."""
    folders = [path for path in entries(hub_cache(), on_error) if path.name.startswith(FOLDER) and path.is_dir()]
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
    """{branch, tag or other ref: its commit}, the main branch first."""
    refs = {file: (folder / "refs" / file).read_text().strip() for file in files_below(folder / "refs", max_depth=4)}
    return dict(sorted(refs.items(), key=lambda item: item[0] != MAIN))


def found(on_error: OnError) -> Iterator[FoundModel]:
    """The models in the cache: each snapshot's safetensors, and each of its GGUF files."""
    for repo, folder in repositories(on_error).items():
        names = {commit: ref for ref, commit in reversed([*_refs(folder).items()])}
        for commit in entries(folder / "snapshots", on_error):
            yield from _in_snapshot(repo, names.get(commit.name, commit.name), commit)


def _in_snapshot(repo: str, revision: str, folder: Path) -> Iterator[FoundModel]:
    at, files = "" if revision == MAIN else f"@{revision}", files_below(folder)
    if weights := [folder / file for file in files if file.endswith(".safetensors") and "/" not in file]:
        yield FoundModel(repo + at, folder, file_bytes(*weights))
    tags = quants.names(quants.gguf_models(files))
    for file, tag in tags.items():
        size = file_bytes(*(folder / part for part in quants.parts_of(file)))
        yield FoundModel(f"{repo}:{tag}{at}", folder / file, size)
    if not weights and not tags and (folder / "config.json").is_file():
        yield FoundModel(repo + at, folder, problem="no .safetensors and no .gguf file is here")
