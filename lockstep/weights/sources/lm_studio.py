"""LM Studio's folders: <folder>/<publisher>/<repository>/ with GGUF files, or with safetensors for MLX."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lockstep.weights.sources import quants
from lockstep.weights.sources.found import FoundModel, NotFound, OnError, entries, file_bytes, files_below

PREFIX = "lmstudio:"
FOLDERS = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<tag>[\w-]+)|[:/](?P<file>[^:]+\.gguf))?")


def folders() -> list[Path]:
    """The folders of LM Studio that are here."""
    return [path for path in (Path(folder).expanduser() for folder in FOLDERS) if os.path.isdir(path)]


def repositories(on_error: OnError) -> Iterator[Path]:
    """The folder of every repository."""
    for folder in folders():
        for publisher in entries(folder, on_error):
            yield from (repository for repository in entries(publisher, on_error) if os.path.isdir(repository))


def resolve(name: str) -> Path:
    """The GGUF file or the folder of "lmstudio:PUBLISHER/REPOSITORY[:QUANT]". ValueError if there is none."""
    wanted = NAME.fullmatch(name.removeprefix(PREFIX))
    if wanted is None or {"..", "."} & set(re.split("[/:]", name)):
        raise ValueError(
            f"{name}: expected {PREFIX}publisher/repository, with :QUANT or /file.gguf where it has several"
        )
    unread: list[OSError] = []
    known = list(repositories(unread.append))
    repository = next((path for path in known if _repo(path).lower() == wanted["repo"].lower()), None)
    if repository is None:
        where = " and ".join(map(str, folders())) or f"no folder {FOLDERS[0]}"
        unreadable = "".join(f"; {error.filename} cannot be read: {error.strerror}" for error in unread)
        raise NotFound(f"{name}: no such model of LM Studio (there is {where}{unreadable})")
    files = files_below(repository)
    if wanted["file"] is None and wanted["tag"] is None and not quants.gguf_models(files):
        return repository
    file = wanted["file"] or quants.choose(files, wanted["tag"], f"{PREFIX}{_repo(repository)}")
    if file not in files:
        raise ValueError(f"{name}: {repository} has no file {file}")
    return repository / file


def _repo(repository: Path) -> str:
    return "/".join(repository.parts[-2:])


def found(on_error: OnError) -> Iterator[FoundModel]:
    """The models of all folders."""
    for repository in repositories(on_error):
        name, files = f"{PREFIX}{_repo(repository)}", files_below(repository)
        tags = quants.names(quants.gguf_models(files))
        for file, tag in tags.items():
            size = file_bytes(*(repository / part for part in quants.present_parts(file, files)))
            full_name = name if len(tags) == 1 else quants.full_name(repository, file, name, tag)
            yield FoundModel(full_name, repository / file, size)
        weights = [repository / file for file in files if file.endswith(".safetensors")]
        if weights and not tags:
            yield FoundModel(name, repository, file_bytes(*weights))
