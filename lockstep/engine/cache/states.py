"""Kept recurrent states in memory, up to a number of bytes: the least recently used state makes room."""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np


class StateStore:
    """Named states of `state_bytes` each, together at most max_bytes. Memory is taken when it is needed, and reused.

    on_name: called with a name and whether its state is there now, when one comes or goes; None: nobody wants to know.
    """

    def __init__(self, max_bytes: int, state_bytes: int) -> None:
        self.max_states, self.state_bytes = max_bytes // state_bytes, state_bytes
        self.num_evicted = 0
        self._states: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._spare: list[np.ndarray] = []
        self.on_name: Callable[[bytes, bool], object] | None = None

    def __contains__(self, name: bytes) -> bool:
        return name in self._states

    def __len__(self) -> int:
        return len(self._states)

    def get(self, name: bytes) -> np.ndarray | None:
        """The state of a name, uint8 [state_bytes], unchanged until the next `put`; None if there is none."""
        if name in self._states:
            self._states.move_to_end(name)
        return self._states.get(name)

    def put(self, name: bytes, fill: Callable[[np.ndarray], object]) -> None:
        """Keeps a state, unless there is one of this name; fill(array) writes its bytes."""
        if name in self._states:
            self._states.move_to_end(name)
            return
        if len(self._states) >= self.max_states:
            evicted, array = self._states.popitem(last=False)
            self._spare.append(array)
            self.num_evicted += 1
            self._note(evicted, False)
        array = self._spare.pop() if self._spare else np.empty(self.state_bytes, np.uint8)
        fill(array)
        self._states[name] = array
        self._note(name, True)

    def drop(self, name: bytes) -> None:
        """Forgets the state of a name, if there is one."""
        if name in self._states:
            self._spare.append(self._states.pop(name))
            self._note(name, False)

    def _note(self, name: bytes, is_there: bool) -> None:
        if self.on_name is not None:
            self.on_name(name, is_there)
