"""A backend is a value: a table from op kind to implementation. Any entry can be swapped for another backend's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lockstep.native.kernel import Kernel
from lockstep.runtime.program import Weight


def raw_weight(weight: Weight) -> tuple[np.ndarray, ...]:
    """The default weight layout: float32 rows, as a definition reads them."""
    return (np.concatenate([part.finite_f32().reshape(-1, weight.shape[-1]) for part in weight.parts]),)


class Layout(NamedTuple):
    """How an implementation reads a weight: `make(weight)` returns an array for each name in `arrays`.

    arrays: names of fields of `operands.WeightArrays`. The arrays are kept by weight and layout name, so that
    implementations can share them.
    """

    name: str
    make: Callable[[Any], tuple]
    arrays: tuple[str, ...] = ("codes",)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    kernel: native code, given an op row, whose words the op's declaration names. layout: of the op's weights. flushes:
    see `runtime.step.FLUSHES`. layouts: {name of an operand: layout} of the weights that have another one. waits:
    whether the threads wait for all others inside the op, which its counter counts.
    """

    kernel: Kernel
    layout: Layout = Layout("f32 rows", raw_weight)
    flushes: bool = False
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    waits: bool = False


OpTable = Mapping[str, Implementation]  # by kind of op


def swapped(backend: OpTable, swaps: Mapping[str, str], others: Mapping[str, OpTable]) -> OpTable:
    """The backend with entries replaced: swaps maps an op kind to the name of the backend (in others) to take it
    from."""
    table = dict(backend)
    for kind, name in swaps.items():
        if name not in others:
            raise ValueError(f"--op {kind}={name}: no such backend; there are {', '.join(sorted(others))}")
        if kind not in others[name]:
            raise ValueError(f"--op {kind}={name}: {name} has no op {kind}; it has {', '.join(sorted(others[name]))}")
        table[kind] = others[name][kind]
    return table
