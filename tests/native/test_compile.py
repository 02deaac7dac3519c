"""Helper processes that compile kernels: none of them outlives the process that started it."""

import subprocess
import sys

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
