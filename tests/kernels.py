"""Compiled kernels, shared by all tests: their folders are named by content and target, so sharing them is safe.

`shared_kernels` is for tests with a cache folder of their own. The plugin compiles missing kernels before the workers
of pytest-xdist start; otherwise each worker would compile the same kernels.
"""

import os
import re
from pathlib import Path

import pytest

from lockstep.native.compile import compile_kernels
from lockstep.ops import BACKENDS
from lockstep.user_cache import PRIVATE, cache_subfolder

SOME_FORMATS = ("f32", "bf16", "q8_0", "q4_0", "q4_k", "codes")  # one for each kind of rows and of packing
ALL_FORMATS = bool(os.environ.get("LOCKSTEP_ALL_FORMATS"))


def shared_kernels(folder: Path) -> Path:
    """Makes a cache folder that holds only a link to the kernels of the cache in use."""
    folder.mkdir(mode=PRIVATE)
    (folder / "kernels").symlink_to(cache_subfolder("kernels"))
    return folder


def is_needed(kind: str) -> bool:
    """Whether `make test` runs kernels of this kind of op. It runs grouped_linear and score, whose tiles are those of
    linear layers, in SOME_FORMATS only; the other formats are for `make test-formats`, see docs/testing.md."""
    found = re.fullmatch(r"(?:grouped_linear|score)_(.*?)(?:_base_f32)?", kind)
    return found is None or found[1] in SOME_FORMATS or ALL_FORMATS


class KernelsFirst:
    """The plugin that compiles kernels."""

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Compiles missing kernels in the main process of pytest-xdist, before it starts its workers."""
        if getattr(session.config.option, "numprocesses", None):
            needed = (op for table in BACKENDS.values() for kind, op in table.items() if is_needed(kind))
            every = {op.kernel.path: op.kernel for op in needed}
            missing = [kernel for kernel in every.values() if not kernel.is_cached]
            if missing:
                print(f"compiling {len(missing)} kernels", flush=True)
            compile_kernels(missing)
