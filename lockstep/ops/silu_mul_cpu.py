"""SwiGLU's product: the fast kernel. Bound by memory: two reads and one write of four bytes per output."""

from lockstep.ops.math import silu
from lockstep.ops.share import dealt
from lockstep.ops.silu_mul import SiluMul
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, variant
from lockstep.runtime.simd import load, store
from lockstep.runtime.step import num_rows

BLOCK = 512  # outputs that one thread takes at a time
ALONE = None  # of a variant: whether one thread makes token after token


def multiply_blocks(op, step, thread, num_threads):
    """Blocks of every row are dealt to threads in turn, so that one row alone keeps all of them busy."""
    a = SiluMul.read(op)
    F, blocks = a.width, (a.width + BLOCK - 1) // BLOCK
    for task in dealt(num_rows(op, step) * blocks, thread, num_threads, ALONE):
        t, first = task // blocks, task % blocks * BLOCK
        gate = a.x + 4 * (2 * F * t + first)
        silu_mul_row(gate, gate + 4 * F, min(BLOCK, F - first), a.out + 4 * (F * t + first))


@inlined
def silu_mul_row(gate, up, F, out):
    """F float32 of one row, by address; F a multiple of 16."""
    for i in range(0, 4 * F, 64):
        store(out + i, silu(load(gate + i)) * load(up + i))


silu_mul = variant(multiply_blocks, "silu_mul", ALONE=False)
silu_mul_per_token = variant(multiply_blocks, "silu_mul_per_token", ALONE=True)

CPU = {"silu_mul": Implementation(silu_mul)}
PER_TOKEN = {"silu_mul": Implementation(silu_mul_per_token)}
