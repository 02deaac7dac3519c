"""Gated norm of each head: the fast kernel. A head stays in L1 between its two passes; bound by exp in silu."""

import numpy as np

from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.simd import fma, lanes, load, sqrt, store, sum_lanes
from lockstep.runtime.step import num_rows, number, word

ONE, ZERO = np.float32(1), np.float32(0)


@kernel
def gated_norm(op, step, thread, num_threads):
    """Heads of all rows, in order, are cut into one run for each thread."""
    H, K = word(op, 6), word(op, 7)
    num_heads = num_rows(op, step) * H
    for i in range(num_heads * thread // num_threads, num_heads * (thread + 1) // num_threads):
        z = word(op, 2) + 4 * (i // H * word(op, 4) + word(op, 5) + i % H * K)
        gate_head(word(op, 1) + 4 * K * i, z, word(op, 3), K, number(op, 8), word(op, 0) + 4 * K * i)


@inlined
def gate_head(o, z, weight, K, eps, out):
    """One head of K float32 at address o, normalised and gated into out."""
    total = lanes(ZERO)
    for i in range(0, 4 * K, 64):
        v = load(o + i)
        total = fma(v, v, total)
    scale = ONE / sqrt(sum_lanes(total) / np.float32(K) + eps)
    for i in range(0, 4 * K, 64):
        store(out + i, ((load(o + i) * scale) * load(weight + i)) * silu(load(z + i)))


CPU = {"gated_norm": Implementation(gated_norm)}
