"""Which blocks of prefixes a replica has in memory: what changed since it was last told."""

from collections import deque

from lockstep.engine.scheduler import Scheduler
from lockstep.replicas.messages import NameChanges


class NameLog:
    """Notes the names of pages (of the layers without a window) and of states that come into memory and leave it.

    The engine's thread notes them; any thread may take the changes.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._pages: deque[tuple[bytes, bool]] = deque()
        self._states: deque[tuple[bytes, bool]] = deque()
        prefix = scheduler.prefix
        if prefix is None:
            return
        whole = [group for group, pages in enumerate(prefix.pages.groups) if not pages.window] or [0]
        prefix.pages.allocators[whole[0]].on_name = lambda name, is_there: self._pages.append((name, is_there))
        if prefix.states is not None:
            prefix.states.on_name = lambda name, is_there: self._states.append((name, is_there))

    def changes(self) -> NameChanges:
        """What changed since the last call."""
        return NameChanges(_taken(self._pages), _taken(self._states))


def _taken(log: deque[tuple[bytes, bool]]) -> list[tuple[bytes, bool]]:
    return [log.popleft() for _ in range(len(log))]
