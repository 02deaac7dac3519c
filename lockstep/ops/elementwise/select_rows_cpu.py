"""Copies some rows of a tensor: the fast kernel. Bound by memory, and rarely more than a few rows."""

from lockstep.native.kernel import kernel
from lockstep.native.numbers import int64
from lockstep.native.simd import load, peek, store
from lockstep.ops.elementwise.select_rows import SelectRows
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import entry, num_rows


@kernel
def select_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn; D a multiple of 16."""
    a = SelectRows.read(op)
    row, selected = 4 * a.width, peek(step + 8 * a.selected, int64)
    for r in range(thread, num_rows(op, step), num_threads):
        source = a.x + row * entry(selected, r)
        for i in range(0, row, 64):
            store(a.out + row * r + i, load(source + i))


CPU = {"select_rows": Implementation(select_rows)}
