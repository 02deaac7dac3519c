"""Helper processes that compile kernels: none of them outlives the process that started it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from lockstep import user_cache
from lockstep.native import compile as compiling
from lockstep.ops import BACKENDS


def test_a_helper_compiles_what_it_is_given_and_ends_in_silence_when_nobody_gives_any_more():
    """Its standard input is also closed when the first process is killed."""
    command = [sys.executable, "-m", "lockstep.native.compile"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as helper:
        for kind in ("add", "add_bias"):
            kernel = BACKENDS["cpu"][kind].kernel
            print(kernel.path, file=helper.stdin, flush=True)
            said = iter(helper.stdout.readline, "\n")  # the name where it has to be compiled, and an empty line
            assert [line.strip() for line in said] in ([], [kernel.name])
            assert kernel.is_cached
        out, err = helper.communicate(timeout=60)
    assert (helper.returncode, out, err) == (0, "", "")


class UncompiledKernel:
    """A kernel that counts how often it is compiled in this process."""

    is_cached, count = False, 0

    def compile(self, on_compile):
        self.count += 1


@pytest.mark.parametrize("free, num_helpers", [(10**9, 1), (10**6, 0)])
def test_no_process_helps_where_it_cannot_hand_over_its_kernels(free, num_helpers, monkeypatch):
    """Otherwise each kernel would be compiled twice."""
    started = []
    monkeypatch.setattr(user_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(compiling, "_share", lambda kernels, num_helpers, on_compile: started.append(num_helpers))
    kernels = [UncompiledKernel() for _ in range(8)]
    compiling.compile_kernels(kernels, num_processes=2)
    assert sum(started) == num_helpers and [kernel.count for kernel in kernels] == [1] * 8
