"""A gated product of which most gates are zero: the fast kernel. Three passes over gates that stay in L1 or L2."""

import numpy as np

from lockstep.native.kernel import variant
from lockstep.native.simd import fma, lanes, load, maximum, sqrt, store, sum_lanes
from lockstep.ops.elementwise.gates.gelu import gelu_tanh_gate
from lockstep.ops.linear.sparse_gate import SparseGate
from lockstep.ops.math import ZERO
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

ONE_THREAD = None  # constant of a variant: whether one thread does all rows


def gate_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = SparseGate.read(op)
    size, width, zeros = 4 * a.width, np.float32(a.width), lanes(ZERO)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        x, out, total, squares = a.x + 2 * size * t, a.out + size * t, zeros, zeros
        for i in range(0, size, 64):
            total = total + load(x + i)
        mean = sum_lanes(total) / width
        for i in range(0, size, 64):
            away = load(x + i) - mean
            squares = fma(away, away, squares)
        cutoff = fma(sqrt(sum_lanes(squares) / width), a.deviations, mean)
        for i in range(0, size, 64):
            store(out + i, gelu_tanh_gate(maximum(load(x + i) - cutoff, zeros), load(x + size + i)))


sparse_gate = variant(gate_rows, "sparse_gate", ONE_THREAD=False)
sparse_gate_per_token = variant(gate_rows, "sparse_gate_per_token", ONE_THREAD=True)

CPU = {"sparse_gate": Implementation(sparse_gate)}
PER_TOKEN = {"sparse_gate": Implementation(sparse_gate_per_token)}
