"""Compiled kernels, shared by all tests: their folders are named by content and target, so sharing them is safe.

`shared_kernels` is for tests with a cache folder of their own; the plugin compiles what is missing before the workers
of pytest-xdist start, which would otherwise each compile the same.
"""

from pathlib import Path

import pytest

from lockstep.ops import BACKENDS
from lockstep.runtime.compile import compile_kernels
from lockstep.runtime.user_cache import PRIVATE, cache_subfolder


def shared_kernels(folder: Path) -> Path:
    """Makes a cache folder that has nothing in it but the kernels of the one in use now."""
    folder.mkdir(mode=PRIVATE)
    (folder / "kernels").symlink_to(cache_subfolder("kernels"))
    return folder


class KernelsFirst:
    """The plugin."""

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Before the workers start. They are told by what they have, workerinput; a run without any has neither."""
        if getattr(session.config.option, "numprocesses", None):
            every = {op.kernel.path: op.kernel for table in BACKENDS.values() for op in table.values()}
            missing = [kernel for kernel in every.values() if not kernel.is_cached]
            if missing:
                print(f"compiling {len(missing)} kernels", flush=True)
            compile_kernels(missing)
