"""Sum of two activations: the fast kernel. Bound by memory: two reads and one write of four bytes per element."""

from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.simd import load, store
from lockstep.runtime.step import num_rows, word

BLOCK = 4096  # bytes that one thread takes at a time


@kernel
def add(op, step, thread, num_threads):
    """Rows lie end to end, so blocks of the whole activation are dealt to threads in turn."""
    out, x, y, num_bytes = word(op, 0), word(op, 1), word(op, 2), 4 * word(op, 3) * num_rows(op, step)
    for start in range(BLOCK * thread, num_bytes, BLOCK * num_threads):
        add_row(x + start, y + start, min(BLOCK, num_bytes - start), out + start)


@inlined
def add_row(x, y, num_bytes, out):
    """Adds num_bytes of float32; whole lanes are stored, up to 60 bytes past the end."""
    for i in range(0, num_bytes, 64):
        store(out + i, load(x + i) + load(y + i))


@kernel
def add_per_token(op, step, thread, num_threads):
    """One token after another on one thread."""
    out, x, y, row = word(op, 0), word(op, 1), word(op, 2), 4 * word(op, 3)
    if thread == 0:
        for t in range(0, num_rows(op, step) * row, row):
            add_row(x + t, y + t, row, out + t)


CPU = {"add": Implementation(add)}
PER_TOKEN = {"add": Implementation(add_per_token)}
