"""A Runner's cache memory as bytes, by page and by request's state, to be copied elsewhere and back."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from lockstep.ops.recurrent.gated_delta_verify import DeltaInputsVerify, GatedDeltaVerify, absorb_all
from lockstep.runtime.program import Program


class Part(Protocol):
    """The part of a request's recurrent state that lies in one cache."""

    num_bytes: int

    def read(self, slot: int, position: int, num_pending: int) -> np.ndarray:
        """A slot's state after `position` tokens, the last num_pending of which are right drafts that the slot has yet
        to absorb: uint8 [num_bytes]."""
        ...

    def write(self, slot: int, position: int, data: np.ndarray) -> None:
        """Writes a state after `position` tokens into a slot; no draft is pending."""
        ...


class Whole:
    """A cache whose slots are the states themselves."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self.num_bytes = rows, rows.shape[1]

    def read(self, slot: int, position: int, num_pending: int) -> np.ndarray:
        return self._rows[slot]

    def write(self, slot: int, position: int, data: np.ndarray) -> None:
        self._rows[slot] = data


class Recurrence:
    """The states of a gated delta rule, and the records from which the drafts of a step can be absorbed afterwards."""

    def __init__(self, op: GatedDeltaVerify, arrays: Mapping[str, np.ndarray]) -> None:
        self._op = op
        self._states = arrays[op.state.name].view(np.float32).reshape(-1, *op.state.shape)
        self._records = arrays[op.records.name].view(np.float32).reshape(-1, *op.records.shape)
        self.num_bytes = op.state.bytes_each

    def read(self, slot: int, position: int, num_pending: int) -> np.ndarray:
        state = self._states[slot]
        if num_pending:
            state = state.copy()
            absorb_all(state, self._records[slot], position, num_pending, self._op.num_k_heads)
        return state.reshape(-1).view(np.uint8)

    def write(self, slot: int, position: int, data: np.ndarray) -> None:
        self._states[slot] = data.view(np.float32).reshape(self._op.state.shape)


class Ring:
    """The inputs of a causal convolution in a ring buffer by position; its state is the last rows, zeros before
    position 0."""

    def __init__(self, op: DeltaInputsVerify, arrays: Mapping[str, np.ndarray]) -> None:
        self._rows, self._num_inputs = (
            arrays[op.state.name].reshape(-1, op.num_rows, 4 * op.channels),
            op.conv_width - 1,
        )
        self.num_bytes = 4 * op.channels * self._num_inputs

    def read(self, slot: int, position: int, num_pending: int) -> np.ndarray:
        positions = np.arange(position - self._num_inputs, position)
        return np.where(positions[:, None] < 0, np.uint8(0), self._rows[slot, positions % self._rows.shape[1]]).ravel()

    def write(self, slot: int, position: int, data: np.ndarray) -> None:
        positions = np.arange(position - self._num_inputs, position)
        self._rows[slot, positions % self._rows.shape[1]] = data.reshape(self._num_inputs, -1)


class Memory:
    """Copies pages and recurrent states out of the arrays of a Runner and into them, between steps.

    page_bytes: of each group of pages, the bytes of one page. state_bytes: of one request's state. Both are over all
    layers, in the order of the program's caches. A state has the same bytes whether the Runner computes drafts or not.
    """

    def __init__(self, program: Program, arrays: Mapping[str, np.ndarray]) -> None:
        rows = {c: arrays[c.name].reshape(-1, c.bytes_each) for c in program.caches}
        groups = range(max(1, len(program.windows())))
        self._pages = [[a for c, a in rows.items() if c.kind == "pages" and c.group == group] for group in groups]
        verifying = {op.state: op for op in program.ops if isinstance(op, (DeltaInputsVerify, GatedDeltaVerify))}
        self._states: list[Part] = []
        for cache, array in rows.items():
            op = verifying.get(cache)
            if isinstance(op, DeltaInputsVerify):
                self._states.append(Ring(op, arrays))
            elif isinstance(op, GatedDeltaVerify):
                self._states.append(Recurrence(op, arrays))
            elif cache.kind == "state":
                self._states.append(Whole(array))
        self.page_bytes = [sum(a.shape[1] for a in arrays) for arrays in self._pages]
        self.state_bytes = sum(part.num_bytes for part in self._states)

    def read_page(self, group: int, page: int, out: np.ndarray) -> None:
        """Copies a page of a group to out, uint8 [page_bytes[group]]."""
        np.concatenate([a[page] for a in self._pages[group]], out=out)

    def write_page(self, group: int, page: int, data: np.ndarray) -> None:
        """Copies data, as `read_page` gave it, to a page of a group."""
        at = 0
        for a in self._pages[group]:
            a[page] = data[at : at + a.shape[1]]
            at += a.shape[1]

    def read_state(self, slot: int, position: int, num_pending: int, out: np.ndarray) -> None:
        """Copies a slot's state after `position` tokens to out, uint8 [state_bytes]; num_pending: see `Part.read`."""
        np.concatenate([part.read(slot, position, num_pending) for part in self._states], out=out)

    def write_state(self, slot: int, position: int, data: np.ndarray) -> None:
        """Copies data, the state after `position` tokens, to a slot."""
        at = 0
        for part in self._states:
            part.write(slot, position, data[at : at + part.num_bytes])
            at += part.num_bytes
