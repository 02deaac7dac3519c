"""Checkpoints of recurrent state in host memory: least recently used out, bounded by bytes."""

from collections import OrderedDict

import numpy as np


class StateStore:
    """Named states of `state_bytes` each. Memory is taken as it is needed, and used again."""

    def __init__(self, max_bytes, state_bytes):
        self.max_states, self.state_bytes = max_bytes // state_bytes, state_bytes
        self.num_evicted = 0
        self._states, self._spare = OrderedDict(), []

    def __contains__(self, name):
        return name in self._states

    def __len__(self):
        return len(self._states)

    def get(self, name):
        """uint8 [state_bytes], which stays as it is until the next `put`; None where there is none."""
        if name in self._states:
            self._states.move_to_end(name)
        return self._states.get(name)

    def put(self, name, fill):
        """Keeps a state; fill(array) writes it. What was used longest ago makes room."""
        if name in self._states:
            self._states.move_to_end(name)
            return
        if len(self._states) >= self.max_states:
            self._spare.append(self._states.popitem(last=False)[1])
            self.num_evicted += 1
        array = self._spare.pop() if self._spare else np.empty(self.state_bytes, np.uint8)
        fill(array)
        self._states[name] = array

    def drop(self, name):
        """Forgets a state, if it is there."""
        if name in self._states:
            self._spare.append(self._states.pop(name))
