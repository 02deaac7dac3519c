"""A process that runs command lines of `lockstep`, each in a copy of itself with limits.

`python -m tests.fuzz.file_child` reads orders and prints outcomes, one JSON object in each line. Copies begin with
everything imported, so that a command takes a fraction of a second.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback

import lockstep.commands.chat
import lockstep.commands.generate
import lockstep.commands.inspect
import lockstep.llm  # noqa: F401
from lockstep.cli import main

ESCAPED = 70  # the exit code where a command raised an exception


def run(order: dict) -> dict:
    """Runs {"args", "stdin", "environment", "cpu_seconds", "seconds", "num_bytes"}.

    Returns {"code" (below 0: a signal), "out", "err", "seconds", "peak_bytes"}.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(order["stdin"].encode())
        given.seek(0)
        began, child = time.monotonic(), os.fork()
        if not child:
            _be_the_command(order, given, out, err)
        status, usage = _wait(child, began + order["seconds"])
        texts = {}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            texts[name] = file.read()[-20_000:].decode("utf-8", "replace")
        code = os.waitstatus_to_exitcode(status)
        return dict(code=code, seconds=time.monotonic() - began, peak_bytes=usage.ru_maxrss << 10, **texts)


def _wait(child: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    """Waits for a child, and kills it at the deadline; returns its status and resource usage."""
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(0.005)


def _be_the_command(order, given, out, err):
    code = ESCAPED
    try:
        for file, number in ((given, 0), (out, 1), (err, 2)):
            os.dup2(file.fileno(), number)
        os.environ.update(order["environment"])
        os.nice(10)
        resource.setrlimit(resource.RLIMIT_CPU, (order["cpu_seconds"], order["cpu_seconds"]))
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + order["num_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, errors="replace") for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        code = main(order["args"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
