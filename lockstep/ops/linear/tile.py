"""A tile of a linear layer as LLVM: the loop over K, which the format emits, and the stores of the results."""

from lockstep.formats import FORMATS
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.tiles import Site, begin, fields, finish, lanes_per_vector, look_ahead
from lockstep.native import targets
from lockstep.native.emit import ir
from lockstep.native.numbers import types
from lockstep.native.simd import I64, LANES, primitive

WHOLE_PANELS = 2  # up to this number of rows, registers hold whole panels even where a panel is several vectors


@primitive()
def linear_tile(context, format, shape, num_rows, x, w, out, ahead):
    """out = x W^T (+ residual) for num_rows rows by a number of panels, over K or a part of K.

    format: its name, a literal. shape: literals: ((fewest rows, most rows), panels, panels that are worked on at a
    time). All panels are read, but only out.num_panels of them are stored. x: `Rows`. w: `Panels`. out: `Output`.
    ahead: `Ahead`.
    """
    heights, num_cols, at_once = shape[0], shape[1].literal_value, shape[2].literal_value
    heights = range(heights[0].literal_value, heights[1].literal_value + 1)

    def codegen(ctx, b, sig, args):
        magic = ctx.codegen().magic_tuple()
        operands = [fields(b, *pair) for pair in zip(sig.args[3:], args[3:], strict=True)]
        choice = b.switch(args[2], end := b.append_basic_block("no_rows"))
        for height in heights:
            choice.add_case(ir.Constant(I64, height), block := b.append_basic_block(f"rows_{height}"))
            b.position_at_start(block)
            for start in range(0, num_cols, at_once):
                _tile(b, magic, format.literal_value, height, range(start, start + at_once), operands)
            b.branch(end)
        b.position_at_start(end)
        return ctx.get_dummy_value()

    return types.void(format, shape, types.int64, x, w, out, ahead), codegen


@primitive()
def scale_bytes(context, format, num_weights):
    """Bytes of the scales of num_weights weights of each feature, in a format whose scales are a stream of their own.

    format: its name, a literal. num_weights: a multiple of 32.
    """

    def codegen(ctx, b, sig, args):
        made = FORMATS[format.literal_value]
        blocks = b.udiv(args[1], ir.Constant(I64, made.stored.size))
        return b.mul(blocks, ir.Constant(I64, made.packed.scales.itemsize if made.packed.scales else 0))

    return types.int64(format, types.int64), codegen


def _tile(b, magic, format, height, panels, operands):
    x, w, out, ahead = operands
    lanes = lanes_per_vector(FORMATS[format].product.rows is QUANTIZED, targets.int_dot(magic))
    columns = [(p, first) for p in panels for first in range(0, LANES, lanes)]
    whole = height <= WHOLE_PANELS or lanes == LANES
    for group in [columns] if whole else [[column] for column in columns]:
        s = Site(b, magic, height, group, lanes, x, w)
        begin(s, out)
        look_ahead(s, w, ahead)
        finish(s, FORMATS[format].tile(s), out)
