"""Names of models on this disk, and those among them that are near to a mistyped one."""

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lockstep.weights.sources import hub_cache, lm_studio, ollama
from lockstep.weights.sources.found import FoundModel, OnError

SOURCES: Mapping[str, Callable[[OnError], Iterator[FoundModel]]] = {
    "Hugging Face cache": hub_cache.found,
    "Ollama": ollama.found,
    "LM Studio": lm_studio.found,
}
MOST_NAMES, SIMILAR = 3, 0.6


def near_names(name: str) -> list[str]:
    """Up to MOST_NAMES names of models on this disk that are like `name`, the most similar first; one for each
    repository of several quants."""
    known = [model.name for found in SOURCES.values() for model in found(lambda error: None)]
    likeness = {each: _likeness(name, each) for each in known}
    near = sorted((each for each in known if max(likeness[each]) >= SIMILAR), key=likeness.__getitem__, reverse=True)
    of_repository: dict[str, str] = {}
    for each in near:
        of_repository.setdefault(each.rpartition(":")[0] or each, each)
    return [*of_repository.values()][:MOST_NAMES]


def _likeness(one: str, other: str) -> tuple[float, float]:
    """How alike the last parts of two names are, and the whole names; from 0 to 1."""
    ratio = lambda first, second: difflib.SequenceMatcher(None, first, second).ratio()
    return ratio(_last_part(one), _last_part(other)), ratio(one.lower(), other.lower())


def _last_part(name: str) -> str:
    """A name without its source, its organization and its tag, as it would be mistyped or misplaced."""
    without_source = name.removeprefix(ollama.PREFIX).removeprefix(lm_studio.PREFIX)
    return without_source.rpartition("/")[2].partition(":")[0].lower()


def near_paths(path: Path) -> list[str]:
    """Up to MOST_NAMES model files and folders beside a path whose names are like its own."""
    try:
        beside = [entry.name for entry in os.scandir(path.parent) if entry.is_dir() or _is_model(entry.name)]
    except (OSError, ValueError):
        return []
    return [str(path.parent / like) for like in difflib.get_close_matches(path.name, beside, MOST_NAMES, SIMILAR)]


def _is_model(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors"))
