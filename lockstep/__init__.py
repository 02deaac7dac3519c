"""Lockstep: an LLM inference engine whose every path gives the same bits, at the speed of the fastest.

Shape suffixes used in all names:

    T  tokens of the step        H  query heads          N  pages of the KV cache
    S  requests of the step      G  kv heads             B  tokens of a page
    R  rows that sample          K  head size            P  pages of a request
    E  rows that are embedded    O  rows of either sort
    D  model width               V  vocabulary           L  layers
    F  feed-forward width        (in linear layers: N output features, K input features)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.completion import Completion, CompletionChunk, CompletionStream
    from lockstep.engine.async_engine import AsyncEngine
    from lockstep.engine.request import SamplingParams
    from lockstep.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "Completion", "CompletionChunk", "CompletionStream", "SamplingParams"]
_HOMES = {
    "LLM": "lockstep.llm",
    "AsyncEngine": "lockstep.engine.async_engine",
    "Completion": "lockstep.completion",
    "CompletionChunk": "lockstep.completion",
    "CompletionStream": "lockstep.completion",
    "SamplingParams": "lockstep.engine.request",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import lockstep` stays fast."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lockstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names of the module, the public ones included that are not imported yet; not what it uses itself."""
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "importlib", "_HOMES"})
