"""Some rows of a step: the fast kernel. Bound by memory, and rarely more than a few rows."""

from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import kernel
from lockstep.runtime.simd import load, store
from lockstep.runtime.step import entry, num_rows, word


@kernel
def select_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn; D a multiple of 16."""
    out, x, row = word(op, 0), word(op, 1), 4 * word(op, 2)
    for r in range(thread, num_rows(op, step), num_threads):
        source = x + row * entry(step, word(op, 3), r)
        for i in range(0, row, 64):
            store(out + row * r + i, load(source + i))


CPU = {"select_rows": Implementation(select_rows)}
