"""SwiGLU's product: the fast kernel. Bound by memory: two reads and one write of four bytes per output."""

from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.simd import load, store
from lockstep.runtime.step import num_rows, word

BLOCK = 512  # outputs that one thread takes at a time


@kernel
def silu_mul(op, step, thread, num_threads):
    """Blocks of every row are dealt to threads in turn, so that one row alone keeps all of them busy."""
    out, x, F = word(op, 0), word(op, 1), word(op, 2)
    blocks = (F + BLOCK - 1) // BLOCK
    for task in range(thread, num_rows(op, step) * blocks, num_threads):
        t, first = task // blocks, task % blocks * BLOCK
        gate = x + 4 * (2 * F * t + first)
        silu_mul_row(gate, gate + 4 * F, min(BLOCK, F - first), out + 4 * (F * t + first))


@inlined
def silu_mul_row(gate, up, F, out):
    """F float32 of one row, by address; F a multiple of 16."""
    for i in range(0, 4 * F, 64):
        store(out + i, silu(load(gate + i)) * load(up + i))


@kernel
def silu_mul_per_token(op, step, thread, num_threads):
    """One token after another on one thread."""
    out, x, F = word(op, 0), word(op, 1), word(op, 2)
    if thread == 0:
        for t in range(num_rows(op, step)):
            silu_mul_row(x + 8 * F * t, x + 8 * F * t + 4 * F, F, out + 4 * F * t)


CPU = {"silu_mul": Implementation(silu_mul)}
PER_TOKEN = {"silu_mul": Implementation(silu_mul_per_token)}
