"""A backend is a value: a table from op kind to implementation. Any entry can be swapped for another backend's."""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.runtime.kernel import Kernel


def raw_weight(weight):
    """The default weight layout: float32 rows, as a definition reads them."""
    import numpy as np

    return (np.concatenate([part.finite_f32().reshape(-1, weight.shape[-1]) for part in weight.parts]),)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    kernel: native code. An op row holds, in this order, the addresses of outputs, of inputs (of all arrays of a
    weight's
    layout), then the parameters. layout: (name, function from a Weight to a tuple of arrays); arrays are kept by weight
    and layout name, so that implementations can share them. flushes: see `runtime.step.FLUSHES`.
    """

    kernel: Kernel
    layout: tuple[str, Callable] = ("f32 rows", raw_weight)
    flushes: bool = False


def swapped(backend, swaps, others):
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
