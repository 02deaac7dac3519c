"""Sum of two activations: the fast kernels. Bound by memory: two reads and one write of four bytes per element."""

from lockstep.native.kernel import inlined, variant
from lockstep.native.numbers import float32
from lockstep.native.simd import fma, load, peek, store
from lockstep.ops.elementwise.add import Add, AddScaled
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

BLOCK = 4096  # bytes that one thread takes at a time
ONE_THREAD = None  # constant of a variant: whether one thread adds row after row


def add_blocks(op, step, thread, num_threads):
    """Rows lie end to end, so blocks of the whole activation are dealt to threads in turn."""
    a = Add.read(op)
    num_bytes, block = 4 * a.width * num_rows(op, step), 4 * a.width if ONE_THREAD else BLOCK
    for task in strided((num_bytes + block - 1) // block, thread, num_threads, ONE_THREAD):
        start = block * task
        add_row(a.x + start, a.y + start, a.factor, min(block, num_bytes - start), a.out + start)


@inlined
def add_row(x, y, factor, num_bytes, out):
    """Adds num_bytes of float32, y times factor; whole vectors are stored, up to 60 bytes past the end."""
    for i in range(0, num_bytes, 64):
        store(out + i, fma(load(y + i), factor, load(x + i)))


def add_scaled_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn, in blocks."""
    a = AddScaled.read(op)
    factor, num_bytes = peek(a.factor, float32), 4 * a.width * num_rows(op, step)
    block = 4 * a.width if ONE_THREAD else BLOCK
    for task in strided((num_bytes + block - 1) // block, thread, num_threads, ONE_THREAD):
        for i in range(block * task, min(block * task + block, num_bytes), 64):
            store(a.out + i, (load(a.x + i) + load(a.y + i)) * factor)


add = variant(add_blocks, "add", ONE_THREAD=False)
add_per_token = variant(add_blocks, "add_per_token", ONE_THREAD=True)
add_scaled = variant(add_scaled_rows, "add_scaled", ONE_THREAD=False)
add_scaled_per_token = variant(add_scaled_rows, "add_scaled_per_token", ONE_THREAD=True)

CPU = {"add": Implementation(add), "add_scaled": Implementation(add_scaled)}
PER_TOKEN = {"add": Implementation(add_per_token), "add_scaled": Implementation(add_scaled_per_token)}
