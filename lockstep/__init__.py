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
import sys
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


def unfit_system(system: str, release: str) -> str | None:
    """Why Lockstep cannot run on a system, named as by `sys.platform`, of some release; None if it can."""
    if system == "win32":
        return "Lockstep runs on Linux and macOS; on Windows it runs in WSL 2, which is Linux: wsl --install"
    if system == "darwin" and int(release.split(".")[0] or 0) < 12:
        return f"Lockstep needs macOS 12 or newer, as Numba and LLVM do; this is macOS {release or 'of no release'}"
    return None


if sys.platform in ("win32", "darwin"):
    import platform

    if _REASON := unfit_system(sys.platform, platform.mac_ver()[0]):
        raise ImportError(_REASON)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import lockstep` stays fast."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lockstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names of the module, the public ones included that are not imported yet; not what it uses itself."""
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "importlib", "sys", "_HOMES"})
