"""Compiled kernels, shared by all tests: their folders are named by content and target, so sharing them is safe.

`shared_kernels` is for tests with a cache folder of their own; the plugin compiles what is missing before the workers
of pytest-xdist start, which would otherwise each compile the same.
"""

import os
import re
from pathlib import Path

import pytest

from lockstep.native.compile import compile_kernels
from lockstep.ops import BACKENDS
from lockstep.user_cache import PRIVATE, cache_subfolder

SOME_FORMATS = ("f32", "bf16", "q8_0", "q4_0", "q4_k", "codes")  # a kind of rows and of packing each
ALL_FORMATS = bool(os.environ.get("LOCKSTEP_ALL_FORMATS"))


def shared_kernels(folder: Path) -> Path:
    """Makes a cache folder that has nothing in it but the kernels of the one in use now."""
    folder.mkdir(mode=PRIVATE)
    (folder / "kernels").symlink_to(cache_subfolder("kernels"))
    return folder


def is_needed(kind: str) -> bool:
    """Whether `make test` runs kernels of a kind. Of layers in groups and of scores, whose tiles are those of linear
    layers, it runs some formats; the others are for `make test-formats`, see docs/testing.md."""
    found = re.fullmatch(r"(?:grouped_linear|score)_(.*?)(?:_base_f32)?", kind)
    return found is None or found[1] in SOME_FORMATS or ALL_FORMATS


class KernelsFirst:
    """The plugin."""

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Before the workers start. They are told by what they have, workerinput; a run without any has neither."""
        if getattr(session.config.option, "numprocesses", None):
            needed = (op for table in BACKENDS.values() for kind, op in table.items() if is_needed(kind))
            every = {op.kernel.path: op.kernel for op in needed}
            missing = [kernel for kernel in every.values() if not kernel.is_cached]
            if missing:
                print(f"compiling {len(missing)} kernels", flush=True)
            compile_kernels(missing)
