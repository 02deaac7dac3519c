"""Rounding of activations to grids: the definition.

Each head of a tensor's rows is rounded to a grid of its own. Columns outside the heads stay as they are.
"""

from lockstep.native.kernel import inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray, float32
from lockstep.native.simd import peek, poke
from lockstep.ops.rounded.attention import row_keys
from lockstep.ops.rounded.grids import GRID_WORDS, quantize_row
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows, setting
from lockstep.runtime.program import Setting, Tensor
from lockstep.runtime.step import StepBlock, num_rows


class FakeQuant(Operands):
    """out = x with head h, columns column + h * stride on, head_width of them, on grid h.

    seen_only: columns are keys by position, of which a head's row has only the first `row_keys`, those that its token
    has scores for (additive: with an added mask); the rest is left alone. out may be x; otherwise one head must have
    all columns.
    """

    in_place = True
    rules = (
        "num_heads >= 1",
        "head_width >= 1",
        "column + (num_heads - 1) * stride + head_width <= width",
        "seen_only >= additive",
    )
    out: Tensor = output("width")
    x: Tensor = rows("width")
    grids: Setting = setting(f"num_heads, {GRID_WORDS}")
    width: int
    column: int
    stride: int
    head_width: int
    num_heads: int
    seen_only: bool = False
    additive: bool = False

    def check(self):
        if self.out is not self.x and self.head_width != self.width:
            raise ValueError(
                f"FakeQuant: {self.out.name} is another tensor than {self.x.name}, of which a head is "
                f"{self.head_width} of {self.width} columns; expected all of them, or both the same"
            )


@inlined
def seen_width(a, step, t):
    """How many columns a head's row has."""
    return min(a.head_width, row_keys(a, StepBlock.read(step), t)) if a.seen_only else a.head_width


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a = FakeQuant.read(op)
        for t in range(num_rows(op, step)):
            row = 4 * a.width * t
            for i in range(a.width if a.out != a.x else 0):
                poke(a.out + row + 4 * i, peek(a.x + row + 4 * i, float32))
            for h in range(a.num_heads):
                x = float_array(a.out + row + 4 * (a.column + h * a.stride))
                grid = float_array(a.grids + 4 * GRID_WORDS * h)
                quantize_row(carray(x, (seen_width(a, step, t),)), carray(grid, (GRID_WORDS,)))


REFERENCE = {"fake_quant": Implementation(_run)}
