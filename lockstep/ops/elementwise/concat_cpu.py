"""Two tensors side by side: the fast kernel. Bound by memory."""

from lockstep.native.kernel import inlined, kernel
from lockstep.native.simd import load, store
from lockstep.ops.elementwise.concat import Concat
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows


@kernel
def concat(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = Concat.read(op)
    first, second = 4 * a.first_width, 4 * a.second_width
    for t in range(thread, num_rows(op, step), num_threads):
        copy(a.first + first * t, a.out + (first + second) * t, first)
        copy(a.second + second * t, a.out + (first + second) * t + first, second)


@inlined
def copy(source, out, num_bytes):
    """Copies num_bytes, a multiple of 64."""
    for i in range(0, num_bytes, 64):
        store(out + i, load(source + i))


CPU = {"concat": Implementation(concat)}
