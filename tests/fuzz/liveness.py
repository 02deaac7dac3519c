"""Checks that a server under attack answers /health in time, and does not grow."""

import time
from typing import NamedTuple

from tests.fuzz.watch import Look, Watcher
from tests.serve.program import Program

MOST_GAP = 0.5  # seconds that /health may take on a machine without other load
MOST_GROWTH_MB = 256
AROUND = 1.0  # seconds before and after a gap in which the machine is looked at


class Stall(NamedTuple):
    """A /health that took too long, or was not 200. slowdown: of the machine at that time; slept: see
    Watcher.longest."""

    look: Look
    slowdown: float
    slept: float

    @property
    def is_fault(self) -> bool:
        """Whether the server is the cause, not other load of the machine."""
        return self.look.status != 200 or self.look.seconds > MOST_GAP * self.slowdown

    def __str__(self):
        if self.look.status != 200:
            return f"/health was answered with {self.look.status}"
        return (
            f"no answer for {self.look.seconds:.2f} s, while others on this machine made work take "
            f"{self.slowdown:.1f} times as long, and sleep {self.slept:.2f} s too long"
        )


class Liveness:
    """Watches a server from other processes until it is closed."""

    def __init__(self, made: Program):
        self._program, self.before_mb = made, made.rss_mb
        self.health, self.machine = Watcher(made.port), Watcher(None)
        self._num_seen = 0
        while not (self.health.looks and self.machine.looks):
            time.sleep(0.01)

    def new_stalls(self) -> list[Stall]:
        """Stalls that were not reported yet."""
        looks = self.health.looks[self._num_seen :]
        self._num_seen += len(looks)
        return [self._stall(look) for look in looks if look.seconds > MOST_GAP or look.status != 200]

    def _stall(self, look: Look) -> Stall:
        span = look.began - AROUND, look.began + look.seconds + AROUND
        return Stall(look, self.machine.slowdown(*span), self.machine.longest(*span))

    @property
    def grown_mb(self) -> float:
        """The growth of the server's memory since the beginning."""
        return self._program.rss_mb - self.before_mb

    def words(self, since: float = 0.0) -> str:
        """In words: the longest gap and the machine's slowdown since a time."""
        slowdown = self.machine.slowdown(since, float("inf"))
        return (
            f"longest gap {self.health.longest(since):.3f} s (work took {slowdown:.1f} times as long as alone, "
            f"a sleep at most {self.machine.longest(since):.3f} s too long)"
        )

    def close(self) -> None:
        """Ends the watching processes."""
        self.health.close()
        self.machine.close()
