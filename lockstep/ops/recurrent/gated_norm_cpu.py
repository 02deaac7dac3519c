"""Gated norm of each head: the fast kernel. A head stays in L1 between its two passes; bound by exp in silu."""

from lockstep.native.kernel import inlined, kernel
from lockstep.native.simd import load, store
from lockstep.ops.elementwise.rms_norm_cpu import inverse_rms
from lockstep.ops.math import silu
from lockstep.ops.recurrent.gated_norm import GatedNorm, place_of
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows


@kernel
def gated_norm(op, step, thread, num_threads):
    """Heads of all rows, in order, are cut into one run for each thread."""
    a = GatedNorm.read(op)
    H, K = a.num_heads, a.head_dim
    num_heads = num_rows(op, step) * H
    for i in range(num_heads * thread // num_threads, num_heads * (thread + 1) // num_threads):
        z = a.z + 4 * (i // H * a.row_width + a.z_offset + i % H * K)
        place = i - i % H + place_of(i % H, H, a.num_in_turn)
        gate_head(a.o + 4 * K * i, z, a.weight, K, a.eps, a.out + 4 * K * place)


@inlined
def gate_head(o, z, weight, K, eps, out):
    """One head of K float32 at address o, normalised and gated into out."""
    scale = inverse_rms(o, K, eps)
    for i in range(0, 4 * K, 64):
        store(out + i, ((load(o + i) * scale) * load(weight + i)) * silu(load(z + i)))


CPU = {"gated_norm": Implementation(gated_norm)}
