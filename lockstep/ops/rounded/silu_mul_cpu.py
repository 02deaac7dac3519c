"""SwiGLU's product, every intermediate on its grid: the fast kernel. A row stays in the first-level cache."""

from lockstep.native.kernel import variant
from lockstep.ops.rounded.grids import GRID_WORDS
from lockstep.ops.rounded.grids_cpu import quantize_row
from lockstep.ops.rounded.row_math_cpu import multiply_rows, sigmoid_row
from lockstep.ops.rounded.silu_mul import RoundedSiluMul
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

ONE_THREAD = None  # constant of a variant: whether one thread does all rows


def multiply(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = RoundedSiluMul.read(op)
    F, grid = a.width, 4 * GRID_WORDS
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        gate, out = a.x + 8 * F * t, a.out + 4 * F * t
        sigmoid_row(gate, F, out)
        quantize_row(out, F, a.grids)
        multiply_rows(gate, out, F, out)
        quantize_row(out, F, a.grids + grid)
        multiply_rows(out, gate + 4 * F, F, out)
        quantize_row(out, F, a.grids + 2 * grid)


rounded_silu_mul = variant(multiply, "rounded_silu_mul", ONE_THREAD=False)
rounded_silu_mul_per_token = variant(multiply, "rounded_silu_mul_per_token", ONE_THREAD=True)

CPU = {"rounded_silu_mul": Implementation(rounded_silu_mul)}
PER_TOKEN = {"rounded_silu_mul": Implementation(rounded_silu_mul_per_token)}
