"""Blocks of quantized activations as LLVM: several at a time, so that none waits for another one's largest value.

A block by itself is one long chain: its largest value, found across lanes, a division, codes, their sums across lanes.
Of several blocks the values across lanes are found together, each block's in a lane of its own.
"""

from lockstep.formats.parts.rows import BLOCK_BYTES, CODES, SCALE
from lockstep.native import targets
from lockstep.native.emit import cut, ir, join, moved, pointer, read, vector, write
from lockstep.native.numbers import types
from lockstep.native.simd import F32, I32, LANES, constant, primitive
from lockstep.ops.elementwise.activations import HIGHEST, ONE_127TH, SMALLEST

SIZE, INFINITE = 0x7FFFFFFF, 0x7F800000  # bits of a float32: all but its sign, and those of infinity
AT_ONCE = 4  # blocks


@primitive()
def quantize_blocks(context, x, out, count):
    """Quantizes 32 * count float32 at address x into blocks at address out: `activations.quantize_block`, with the
    same bits. count: a literal, a power of two."""
    num_blocks = count.literal_value

    def codegen(ctx, b, sig, args):
        _emit(b, targets.of(ctx.codegen().magic_tuple()), pointer(b, args[0]), pointer(b, args[1]), num_blocks)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, count), codegen


def _emit(b, target, x, out, num_blocks):
    """Emits num_blocks blocks; x, out: pointers. Values are read again for their codes: where they do not fit into the
    registers, that is cheaper than to keep them."""
    value = lambda i: read(b, moved(b, x, 4 * LANES * i), vector(F32, LANES), 4)
    scale, inverse, is_finite = _scales(b, [value(i) for i in range(2 * num_blocks)])
    sums = []
    for i in range(2 * num_blocks):
        scaled = b.fmul(_masked(b, value(i), is_finite, i // 2), _in_all_lanes(b, inverse, i // 2))
        codes, narrow = target.rounded_bytes(b, scaled)
        sums.append(folded(b, b.add, codes, num_blocks))
        write(b, moved(b, out, BLOCK_BYTES * (i // 2) + CODES + i % 2 * LANES), narrow)
    for i, row in enumerate(_tails(b, scale, across(b, b.add, sums[::2]), across(b, b.add, sums[1::2]))):
        write(b, moved(b, out, BLOCK_BYTES * i + SCALE), row)


def _scales(b, halves):
    """Scale and inverse of each block, and int32 with all bits set where it has neither NaN nor infinity.

    As integers, sizes of float32 are in the same order, with NaN above infinity.
    """
    larger = lambda x, y: b.select(b.icmp_signed(">", x, y), x, y)
    wide = vector(I32, LANES)
    sizes = [b.and_(b.bitcast(v, wide), constant(wide, SIZE)) for v in halves]
    tops = [folded(b, larger, larger(*sizes[i : i + 2]), len(sizes) // 2) for i in range(0, len(sizes), 2)]
    top = across(b, larger, tops)
    is_finite = b.icmp_signed("<", top, constant(top.type, INFINITE))
    amax = b.bitcast(b.select(is_finite, top, constant(top.type, INFINITE)), floats := vector(F32, len(tops)))
    is_zero = b.fcmp_ordered("<", amax, constant(floats, float(SMALLEST)))
    scale = b.fmul(amax, constant(floats, float(ONE_127TH)))
    inverse = b.fdiv(constant(floats, float(HIGHEST)), amax)
    zero = constant(floats, 0.0)
    return b.select(is_zero, zero, scale), b.select(is_zero, zero, inverse), b.sext(is_finite, top.type)


def _masked(b, v, is_finite, block):
    """v, or zeros where a value of its block is not finite: all codes of the block are zero then."""
    bits = b.bitcast(v, vector(I32, LANES))
    return b.bitcast(b.and_(bits, _in_all_lanes(b, is_finite, block)), v.type)


def _tails(b, scale, first, last):
    """What follows the codes of each block, scale, bias, scaled bias and sums, as four int32. first, last: sums of its
    halves."""
    bias = b.mul(b.add(first, last), constant(first.type, -128))
    scaled_bias = b.fmul(b.sitofp(bias, scale.type), scale)
    sums = b.or_(b.and_(first, constant(first.type, 0xFFFF)), b.shl(last, constant(last.type, 16)))
    fields, n = [b.bitcast(v, bias.type) for v in (scale, bias, scaled_bias, sums)], scale.type.count
    table = join(b, join(b, *fields[:2]), join(b, *fields[2:]))
    pick = lambda block: ir.Constant(vector(I32, 4), [n * field + block for field in range(4)])
    return [b.shuffle_vector(table, ir.Constant(table.type, ir.Undefined), pick(block)) for block in range(n)]


def folded(b, combine, v, count):
    """The lanes of v combined until `count` are left, in any order."""
    while v.type.count > count:
        half = v.type.count // 2
        v = combine(cut(b, v, 0, half), cut(b, v, half, half))
    return v


def across(b, combine, vectors):
    """As many vectors as each has lanes; lane i: the lanes of vector i, combined in any order."""
    count = lanes = len(vectors)
    while lanes > 1:  # of each vector that was given, in each of those that are left
        starts = [lane for lane in range(2 * count) if lane % lanes < lanes // 2]
        low, high = (ir.Constant(vector(I32, count), [s + more for s in starts]) for more in (0, lanes // 2))
        pairs = [vectors[i : i + 2] for i in range(0, len(vectors), 2)]
        vectors = [combine(b.shuffle_vector(x, y, low), b.shuffle_vector(x, y, high)) for x, y in pairs]
        lanes //= 2
    return vectors[0]


def _in_all_lanes(b, v, lane):
    """A lane of a vector, in all of sixteen."""
    lanes = ir.Constant(vector(I32, LANES), [lane] * LANES)
    return b.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), lanes)
