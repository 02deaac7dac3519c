"""When fresh replicas take the places of lost ones."""

import time

LONGEST_PAUSE = 30.0  # seconds before a replica that does not start is started again


class Replacements:
    """Plans starts. A replica that failed to start max_starts times in a row is given up."""

    def __init__(self, num_replicas: int, max_starts: int) -> None:
        self._max_starts = max_starts
        self._failed = dict.fromkeys(range(num_replicas), 0)
        self._start_at: dict[int, float] = {}
        self.given_up: set[int] = set()

    def __len__(self) -> int:
        """How many replicas the fleet is to have."""
        return len(self._failed)

    @property
    def are_all_given_up(self) -> bool:
        """Whether no replica will be started any more."""
        return len(self.given_up) == len(self._failed)

    def started(self, number: int) -> None:
        """A replica can run requests."""
        self._failed[number] = 0

    def plan(self, number: int, has_failed: bool) -> bool:
        """A replica has ended. has_failed: before it could run requests. Returns whether it will be started again: at
        once, or after a pause where the last starts failed."""
        failed = self._failed[number] = self._failed[number] + 1 if has_failed else 0
        if failed >= self._max_starts:
            self.given_up.add(number)
            return False
        self._start_at[number] = time.monotonic() + (min(LONGEST_PAUSE, 2.0**failed) if failed else 0.0)
        return True

    def revive(self) -> None:
        """Gives replicas that were given up another chance, at once."""
        for number in self.given_up:
            self._failed[number], self._start_at[number] = 0, time.monotonic()
        self.given_up.clear()

    def take_due(self) -> list[int]:
        """The replicas whose time has come."""
        now = time.monotonic()
        due = [number for number, at in self._start_at.items() if at <= now]
        for number in due:
            del self._start_at[number]
        return due
