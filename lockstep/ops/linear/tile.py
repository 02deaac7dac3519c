"""A tile of a linear layer as LLVM: the loop over K, which the format emits, and the stores of the results."""

from lockstep.formats import FORMATS
from lockstep.formats.format import LINE_BYTES
from lockstep.formats.parts.rows import BLOCK, NATIVE_BF16, QUANTIZED
from lockstep.formats.parts.tiles import Site, Use, begin, fields, finish, look_ahead
from lockstep.native import targets
from lockstep.native.emit import ir
from lockstep.native.numbers import types
from lockstep.native.simd import I1, I64, LANES, primitive

K_UNIT = max(format.packed.size for format in FORMATS.values())
WHOLE_PANELS = 2  # up to this number of rows, registers hold the sums of whole panels on every target


def needs_flushing(format):
    """Whether kernels of a format run in FLUSH mode, because this target has no instruction for products of pairs."""
    return format.flushes and not NATIVE_BF16


@primitive()
def linear_tile(context, weights, shape, num_rows, x, w, out, ahead):
    """out = x W^T (+ residual or biases) for num_rows rows by a number of panels, over K or a part of K.

    weights: literals: the name of their format, and their layout: "plain", "dense", "unpacking", which also writes
    plain panels unpacked, or "last", which is what tiles after such a one read, or plain in formats that are not
    unpacked. Nothing is emitted for a layout that the format lacks. shape: literals: ((fewest rows, most rows), panels,
    panels that are worked on at a time); of several tiles the first, which unpacks, has one more row at least.
    Only out.num_panels of them are stored; of those that are worked on one after the other, the others are not read.
    x: `Rows`. w: `Panels`. out: `Output`. ahead: `Ahead`.
    """
    num_cols, at_once = shape[1].literal_value, shape[2].literal_value
    format, layout = (part.literal_value for part in weights)
    fewest, most = (height.literal_value for height in shape[0])
    heights = range(fewest + (layout == "unpacking"), most + 1)
    streams = layout in ("plain", "dense") or at_once < num_cols  # for few rows, or in tall tiles

    def codegen(ctx, b, sig, args):
        magic = ctx.codegen().magic_tuple()
        tile, use = _tile_of(FORMATS[format], layout, targets.of(magic))
        operands = [fields(b, *pair) for pair in zip(sig.args[3:], args[3:], strict=True)]
        choice = b.switch(args[2], end := b.append_basic_block("no_rows"))
        for height in heights if tile else ():
            choice.add_case(ir.Constant(I64, height), block := b.append_basic_block(f"rows_{height}"))
            b.position_at_start(block)
            for start in range(0, num_cols, at_once):
                if start:
                    _end_unless(b, b.icmp_signed(">", operands[2].num_panels, ir.Constant(I64, start)), end)
                panels = range(start, start + at_once)
                emit_tile(tile, b, magic, format, height, panels, operands, use=use, streams=streams)
            b.branch(end)
        b.position_at_start(end)
        return ctx.get_dummy_value()

    return types.void(weights, shape, types.int64, x, w, out, ahead), codegen


@primitive()
def scale_bytes(context, format, num_weights):
    """Bytes of the scales, or of a dense layout's headers, of a panel of num_weights weights of each feature, in a
    format that has them in a stream of their own.

    format: its name, a literal. num_weights: a multiple of 32, of a header's where the layout is dense.
    """
    packed = FORMATS[format.literal_value].packed

    def codegen(ctx, b, sig, args):
        return ir.Constant(I64, packed.scales.itemsize) if packed.per_row else _scales_before(b, format, args[1])

    return types.int64(format, types.int64), codegen


@primitive()
def row_offset(context, format, k):
    """Where the values from k on begin in a prepared row, in bytes. format: of the weights, a literal; k: a multiple of
    32."""
    rows = FORMATS[format.literal_value].product.rows

    def codegen(ctx, b, sig, args):
        return _blocks(b, args[1], BLOCK, rows.num_bytes.py_func(BLOCK))

    return types.int64(format, types.int64), codegen


@primitive()
def scale_offset(context, format, k):
    """Where the scales of the weights from k on begin in those of a panel, in bytes; arguments as of `scale_bytes`."""
    packed = FORMATS[format.literal_value].packed

    def codegen(ctx, b, sig, args):
        return ir.Constant(I64, 0) if packed.per_row else _scales_before(b, format, args[1])

    return types.int64(format, types.int64), codegen


def _scales_before(b, format, num_weights):
    made = FORMATS[format.literal_value]
    if made.dense is not None:
        return _blocks(b, num_weights, made.dense.block_size, made.dense.header_bytes)
    return _blocks(b, num_weights, made.stored.size, made.packed.scales.itemsize if made.packed.scales else 0)


@primitive()
def panel_bytes(context, format, num_weights, scales):
    """Bytes of the codes of a panel of num_weights weights of each feature. format: its name, a literal. scales: the
    address of the stream of scales, or of a dense layout's headers; 0 if there is none."""

    def codegen(ctx, b, sig, args):
        made = FORMATS[format.literal_value]
        plain = _blocks(b, args[1], made.packed.size, made.packed.panel.itemsize)
        if made.dense is None:
            return plain
        has_headers = b.icmp_signed("!=", args[2], ir.Constant(I64, 0))
        return b.select(has_headers, _blocks(b, args[1], made.dense.block_size, made.dense.group_bytes), plain)

    return types.int64(format, types.int64, types.int64), codegen


@primitive()
def unpacked_bytes(context, format, num_weights):
    """Bytes that a panel of num_weights weights is unpacked to for tiles of many rows; 0: it is not."""

    def codegen(ctx, b, sig, args):
        num_vectors = FORMATS[format.literal_value].unpacked_on(targets.of(ctx.codegen().magic_tuple()))
        return _blocks(b, args[1], BLOCK, LINE_BYTES * num_vectors)

    return types.int64(format, types.int64), codegen


@primitive()
def is_dense(context, format, scales):
    """Whether weights lie in the dense layout of their format, whose name is a literal. scales: the address of the
    layout's headers, or of the scales that other formats have in a stream of their own."""
    has_dense = FORMATS[format.literal_value].dense is not None

    def codegen(ctx, b, sig, args):
        return b.icmp_signed("!=", args[1], ir.Constant(I64, 0)) if has_dense else ir.Constant(I1, 0)

    return types.boolean(format, types.int64), codegen


def _blocks(b, num_weights, size, num_bytes):
    """The bytes of num_weights weights, of which `size` take num_bytes."""
    return b.mul(b.udiv(num_weights, ir.Constant(I64, size)), ir.Constant(I64, num_bytes))


def _end_unless(b, condition, end):
    """Branches to a block unless the condition holds."""
    b.cbranch(condition, goes_on := b.append_basic_block("goes_on"), end)
    b.position_at_start(goes_on)


def _tile_of(format, layout, target):
    """The function that emits a tile of a layout, or None, and what its site does with what codes are unpacked to."""
    if layout == "dense":
        return format.dense and format.dense.tile, Use.OWN
    unpacks = format.unpacked_on(target) > 0
    if layout == "unpacking":
        return format.tile if unpacks else None, Use.WRITE
    return format.tile, Use.READ if layout == "last" and unpacks else Use.OWN


def emit_tile(tile, b, magic, format, height, panels, operands, *, use=Use.OWN, streams=True):
    """Emits a tile of `height` rows by some panels, column after column where tiles do not have whole panels. tile:
    the format's function; operands: `Rows`, `Panels`, `Output`, `Ahead`; streams: see `look_ahead`."""
    x, w, out, ahead = operands
    target, made = targets.of(magic), FORMATS[format]
    lanes = target.dot_lanes if made.product.rows is QUANTIZED else LANES
    columns = [(p, first) for p in panels for first in range(0, LANES, lanes)]
    whole = height <= WHOLE_PANELS or lanes == LANES or target.whole_tile
    for group in [columns] if whole else [[column] for column in columns]:
        s = Site(b, magic, height, group, lanes, x, w, num_vectors=made.unpacked_on(target), use=use)
        s.flushes, s.is_last = needs_flushing(made), b.icmp_signed("!=", out.is_last, s.int(0))
        begin(s, out)
        look_ahead(s, ahead, streams, made.one_row_ahead)
        finish(s, tile(s), out)
