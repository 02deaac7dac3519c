"""The program `lockstep serve` as users run it: a process of its own, with the bundled model."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.server import ROOT


class Program:
    """A running server process. port, url: its address; said: the lines that it printed."""

    def __init__(self, process, port, said):
        self.process, self.port, self.url, self.said = process, port, f"http://127.0.0.1:{port}", said
        self._reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
        self._reader.start()

    def signal(self, number=signal.SIGTERM):
        """Sends a signal."""
        self.process.send_signal(number)

    def metrics(self):
        """{name and labels: value} of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return {
            (s.name.removeprefix("lockstep_"), *s.labels.values()): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def is_idle(self):
        """Whether no request is being answered, and no page of the KV cache is in use."""
        found = {name: value for (name, *_), value in self.metrics().items()}
        held = found["pages"] - found["pages_free"] - found["pages_idle"]
        return not (held or found["running"] or found["waiting"] or found["open_requests"] or found["queued_tokens"])

    def check_alive(self):
        """AssertionError with its output if the process has ended."""
        assert self.process.poll() is None, f"exit code {self.process.returncode}: {''.join(self.said)}"

    def end(self):
        """Kills the process if it still runs, and waits for the rest of its output."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    @property
    def rss_mb(self):
        """Resident memory in megabytes (2**20 bytes)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1024

    @property
    def processor_seconds(self):
        """User and system time of all its threads so far, in seconds."""
        used = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def program(*options):
    """A context with a Program that is ready, which is killed at the end if it still runs."""
    command = [sys.executable, "-m", "lockstep", "serve", "--port", "0", "--threads", "1", *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    made = None
    try:
        said, ready = [], None
        while ready is None:  # lines of progress may come before the line that says it is ready
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)
            ready = re.search(r"is ready at http://127\.0\.0\.1:(\d+)/v1", said[-1])
        made = Program(process, int(ready[1]), said)
        yield made
    finally:
        made.end() if made else process.kill()
        process.wait()
        process.stdout.close()
