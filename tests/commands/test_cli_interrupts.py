"""A command that is interrupted, or whose output nobody reads, ends with an exit code and no traceback."""

import os
import signal
import subprocess
import sys

import pytest

from lockstep.cli import main
from lockstep.commands.terminal import answer

PROMPT = "def read_lines(path):\n"


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(answer, "answer", interrupted)
    assert main(["generate", "-p", "x"]) == 130
    said = capsys.readouterr().err  # where kernels are not there yet, that they are compiled
    assert "Traceback" not in said and "KeyboardInterrupt" not in said


GENERATE = [
    sys.executable,
    "-m",
    "lockstep",
    "generate",
    "-p",
    PROMPT,
    "-n",
    "4000",
    "--temperature",
    "1.5",
    "--min-tokens",
    "4000",
]


def process_that_cannot_end(handler):
    """A process that writes more than a pipe holds, so that it waits for its reader, however fast the machine is.
    handler: the handler of SIGINT that the process inherits."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        process = subprocess.Popen(GENERATE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, pipesize=4096)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout.read(1)
    return process


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
def test_ctrl_c_leaves_no_traceback(handler):
    with process_that_cannot_end(handler) as process:
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and b"Traceback" not in error and b"Exception" not in error


def test_a_closed_pipe_leaves_no_traceback():
    with process_that_cannot_end(signal.SIG_DFL) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(600) == 141 and b"Traceback" not in error and b"Exception" not in error


@pytest.mark.parametrize("args", [["inspect"], ["inspect", "--json"]])
def test_output_that_nobody_reads(args):
    command = [sys.executable, "-m", "lockstep", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141
