"""Rounding of activations to grids: the fast kernel. Bound by memory: a read and a write of four bytes a number."""

from lockstep.native.kernel import variant
from lockstep.ops.rounded.fake_quant import FakeQuant, seen_width
from lockstep.ops.rounded.grids import GRID_WORDS
from lockstep.ops.rounded.grids_cpu import quantize_row
from lockstep.ops.rounded.row_math_cpu import copy_row
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

ONE_THREAD = None  # constant of a variant: whether one thread does all rows


def quantize_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = FakeQuant.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        row, num_values = 4 * a.width * t, seen_width(a, step, t)
        if a.out != a.x:
            copy_row(a.x + row, a.width, a.out + row)
        for h in range(a.num_heads):
            quantize_row(a.out + row + 4 * (a.column + h * a.stride), num_values, a.grids + 4 * GRID_WORDS * h)


fake_quant = variant(quantize_rows, "fake_quant", ONE_THREAD=False)
fake_quant_per_token = variant(quantize_rows, "fake_quant_per_token", ONE_THREAD=True)

CPU = {"fake_quant": Implementation(fake_quant)}
PER_TOKEN = {"fake_quant": Implementation(fake_quant_per_token)}
