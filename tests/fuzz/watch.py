"""Checks from a process of its own that a server is alive all the time: `python -m tests.fuzz.watch PORT`.

Every 50 ms it asks for /health on a new connection, as an orchestrator would. Without a port it looks at the machine
instead: how much too long a sleep of 50 ms took, and how many times longer than alone a little work takes. Where others
use the same cores, no server can answer as fast as on a machine of its own. Prints JSON lines.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PERIOD = 0.05
WORK_SECONDS = 0.003
SHOWN = 0.1  # seconds: longer gaps are reported one by one
ASKED = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Look(NamedTuple):
    """One look, with times of time.monotonic. seconds: without an answer, or of oversleeping; status: of the answer;
    slowdown: the time of a small piece of work, as a multiple of its time on an idle machine."""

    began: float
    seconds: float
    status: int | None = 200
    slowdown: float = 1.0


def look_at_server(port: int) -> Look:
    """Asks for /health."""
    began, answer = time.monotonic(), b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(ASKED)
            while piece := connection.recv(1 << 12):
                answer += piece
    except OSError:
        pass
    found = re.match(rb"HTTP/1\.1 (\d+)", answer)
    return Look(began, time.monotonic() - began, int(found[1]) if found else None)


def look_at_machine() -> Look:
    """Measures how much a short sleep and a small piece of work are delayed."""
    began = time.monotonic() + PERIOD
    time.sleep(PERIOD)
    woke, used = time.monotonic(), time.process_time()
    while time.process_time() < used + WORK_SECONDS:
        pass
    return Look(began, woke - began, 200, (time.monotonic() - woke) / (time.process_time() - used))


def watch(port: int | None) -> None:
    """Looks until nobody reads its output. Of short gaps in a row only the longest is reported; of the machine all."""
    longest, told = Look(0, 0), 0.0
    while True:
        found = look_at_machine() if port is None else look_at_server(port)
        longest = max(longest, found, key=lambda each: each.seconds)
        if port is None or found.seconds > SHOWN or found.status != 200 or found.began - told > 0.5:
            print(json.dumps(found if port is None or found.seconds > SHOWN else longest), flush=True)
            longest, told = Look(found.began, 0), found.began
        if port is not None:
            time.sleep(max(0.0, PERIOD - found.seconds))


class Watcher:
    """A process that watches. port: of the server, or None to watch the machine. looks: the reported Looks."""

    def __init__(self, port: int | None):
        self.looks: list[Look] = []
        command = [sys.executable, "-m", "tests.fuzz.watch", *([] if port is None else [str(port)])]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.looks.append(Look(*json.loads(line)))

    def during(self, since: float = 0.0, until: float = float("inf")) -> list[Look]:
        """The looks that overlap a span of time."""
        return [each for each in self.looks if each.began + each.seconds >= since and each.began <= until]

    def longest(self, since: float = 0.0, until: float = float("inf")) -> float:
        """The longest time without an answer, in seconds, that overlaps a span of time."""
        return max((each.seconds for each in self.during(since, until)), default=0.0)

    def slowdown(self, since: float, until: float) -> float:
        """The average slowdown in a span of time."""
        found = [each.slowdown for each in self.during(since, until)]
        return max(1.0, sum(found) / len(found)) if found else 1.0

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


if __name__ == "__main__":
    watch(int(sys.argv[1]) if len(sys.argv) > 1 else None)
