"""Linear tiles of 4-, 5- and 8-bit weights: exact integer dots over blocks of 32, then the block's scales.

Which instruction makes the dots is the target's (`targets.int_dot`). The integers are exact, so all give the same bits;
the float32 steps that follow are those of the definitions in `ops/linear.py`.
"""

from llvmlite import ir

from lockstep.runtime.emit import by_halves, fma, halves_f32, moved, pinned, read, spread, spread4, vector, words
from lockstep.runtime.simd import F32, I1, I16, I32, call, constant, splat

Q4_1_BYTES, Q5_0_BYTES, Q5_1_BYTES = 320, 320, 384  # of a panel's stream, for 32 k (see formats/pack_q5.py)


def vnni(b, acc, w, a):
    return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}", acc.type, [acc, w, a])


def sdot(b, acc, w, a):
    """Signed by signed, four lanes at a time."""
    return by_halves(b, lambda b, *v: call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", v[0].type, [*v]), acc, w, a)


def widened(b, acc, w, a):
    """Signed by signed on any target: every fourth product, four times."""
    kind = vector(I32, w.type.count)
    products = b.mul(b.sext(w, kind), b.sext(a, kind))
    for j in range(4):
        acc = b.add(acc, every_fourth(b, products, j))
    return acc


def every_fourth(b, v, start):
    lanes = list(range(start, v.type.count, 4))
    return b.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), ir.Constant(vector(I32, len(lanes)), lanes))


def maddubs(b, unsigned, signed):
    return call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), [unsigned, signed])


def maddwd(b, x, y):
    return call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), [x, y])


def pair_sums(b, v):
    """int16 pairs as int32."""
    return maddwd(b, v, constant(v.type, 1))


WIDE = {"avx512_vnni": vnni, "avx_vnni": vnni, "sdot": sdot, "generic": widened}


# ---------------------------------------------------------------- 8 bits


def q8_0(s):
    """acc = fma(float(dot), w_scale * a_scale, acc)."""
    dots = _q8_avx2 if s.how == "avx2" else _q8_wide
    return s.blocks(32, lambda i, acc: scale_add(s, acc, dots(s, i), w_scales(s, i), i), 512, 32)


def w_scales(s, i):
    """The weights' float16 scales of block i, as float32, for every panel."""
    start = s.b.mul(i, s.int(32))
    places = [moved(s.b, moved(s.b, place, start), 2 * first) for place, first in zip(s.scales, s.first, strict=True)]
    return [halves_f32(s.b, place, s.lanes) for place in places]


def scale_add(s, acc, dots, scales, i):
    """acc = fma(float(dots), scales * a_scale, acc), cell by cell."""
    b = s.b
    rows = [spread(b, s.a_scale(r, i), F32, s.lanes) for r in range(s.rows)]
    return {(r, c): fma(b, b.sitofp(dots[r, c], s.floats), b.fmul(scales[c], rows[r]), acc[r, c]) for r, c in s.cells}


def zero_points(s, i, shift):
    """What unsigned codes add too much, for every row: bias >> shift in all lanes."""
    biases = [spread(s.b, s.bias(r, i), I32, s.lanes) for r in range(s.rows)]
    return [s.b.ashr(v, constant(s.ints, shift)) if shift else v for v in biases]


def _q8_wide(s, i):
    """Codes plus 128 where the instruction takes unsigned weights, else signed codes."""
    b, dot, unsigned = s.b, WIDE[s.how], "vnni" in s.how
    first = zero_points(s, i, 0) if unsigned else [constant(s.ints, 0)] * s.rows
    dots = {(r, c): first[r] for r, c in s.cells}
    start = b.mul(i, s.int(512))
    for g in range(8):
        columns = [s.codes(c, start, 64 * g) for c in range(s.cols)]
        for r in range(s.rows):
            a = spread4(b, s.code(r, i, 4 * g), s.lanes)
            for c in range(s.cols):
                dots[r, c] = dot(b, dots[r, c], columns[c], a)
    return dots


def _q8_avx2(s, i):
    """|w| times a with the sign of w: at most 2 * 127 * 127 a pair."""
    if s.rows > 1:
        return _q8_avx2_rows(s, i)
    b, start, dots = s.b, s.b.mul(i, s.int(512)), [constant(s.ints, 0)] * s.cols
    for g in range(8):
        a = spread4(b, s.code(0, i, 4 * g), s.lanes)
        for c in range(s.cols):
            w = s.codes(c, start, 64 * g)
            signed = call(b, "llvm.x86.avx2.psign.b", w.type, [a, w])
            dots[c] = b.add(dots[c], pair_sums(b, maddubs(b, absolute(b, w), signed)))
        dots = pinned(b, dots)
    return {(0, c): v for c, v in enumerate(dots)}


def absolute(b, w):
    return call(b, f"llvm.abs.v{w.type.count}i8", w.type, [w, constant(I1, 0)])


def _q8_avx2_rows(s, i):
    """The same with fewer multiplications a row: a xor the sign of w, which counts a as -a - 1 where w is negative.

    At most 2 * 127 * 128 a pair. The excess is the sum of the negative w, the same for all rows.
    """
    b, start, dots, excess = s.b, s.b.mul(i, s.int(512)), {}, {}
    for g in range(8):
        for c in range(s.cols):
            w = s.codes(c, start, 64 * g)
            sign, size = b.sext(b.icmp_signed("<", w, constant(w.type, 0)), w.type), absolute(b, w)
            extra = maddubs(b, size, sign)
            excess[c] = b.add(excess[c], extra) if g else extra
            for r in range(s.rows):
                pairs = pair_sums(b, maddubs(b, size, b.xor(spread4(b, s.code(r, i, 4 * g), s.lanes), sign)))
                dots[r, c] = b.add(dots[r, c], pairs) if g else pairs
        held = dict(zip([*dots, *excess], pinned(b, [*dots.values(), *excess.values()]), strict=True))
        dots, excess = {k: held[k] for k in dots}, {k: held[k] for k in excess}
    excess = {c: pair_sums(b, v) for c, v in excess.items()}
    return {(r, c): b.sub(v, excess[c]) for (r, c), v in dots.items()}


# ---------------------------------------------------------------- 4 bits


def q4_0(s):
    """acc = fma(float(dot), w_scale * a_scale, acc), codes minus 8: bias is -128 * sum, so bias >> 4 is -8 * sum."""
    return _with_zero_points(s, dots_u4, 256, 4)


def _with_zero_points(s, dots, num_bytes, shift):
    """dots: of unsigned codes, which count bias >> shift too much. num_bytes: of a block in a panel."""

    def block(i, acc):
        start = s.b.mul(i, s.int(num_bytes))
        return scale_add(s, acc, dots(s, i, start, zero_points(s, i, shift)), w_scales(s, i), i)

    return s.blocks(32, block, num_bytes, 32)


def nibbles(b, v):
    """Two groups of codes 0..15 from bytes: the low halves, then the high ones."""
    high = b.bitcast(b.lshr(words(b, v), constant(words(b, v).type, 4)), v.type)
    return b.and_(v, constant(v.type, 15)), b.and_(high, constant(v.type, 15))


def dots_u4(s, i, start, first):
    """Dots of a block with codes 0..15, `start` bytes into the panels, on top of first[row] (or of zero).

    AVX2's 16-bit sums of pairs stay below 8 * 2 * 15 * 127 = 30480 over a whole block.
    """
    columns = lambda g: [nibbles(s.b, s.codes(c, start, 32 * g)) for c in range(s.cols)]
    return unsigned_dots(s, i, columns, first, 8)


def unsigned_dots(s, i, columns, first, groups):
    """Dots of block i with unsigned codes, on top of first[row] (or of zero).

    columns(g): for each column the codes of groups g and g + 1. groups: how many groups' sums of pairs, each twice a
    code times 127 at most, 16 bits hold.
    """
    return _unsigned_avx2(s, i, columns, first, groups) if s.how == "avx2" else _unsigned_wide(s, i, columns, first)


def _unsigned_wide(s, i, columns, first):
    b, dot = s.b, WIDE[s.how]
    dots = {(r, c): first[r] if first else constant(s.ints, 0) for r, c in s.cells}
    for g in range(0, 8, 2):
        codes = columns(g)
        for half in (0, 1):
            for r in range(s.rows):
                a = spread4(b, s.code(r, i, 4 * (g + half)), s.lanes)
                for c in range(s.cols):
                    dots[r, c] = dot(b, dots[r, c], codes[c][half], a)
    return dots


def _unsigned_avx2(s, i, columns, first, groups):
    b, sums, dots = s.b, {}, {}
    for g in range(0, 8, 2):
        codes = columns(g)
        for half in (0, 1):
            for r, c in s.cells:
                pairs = maddubs(b, codes[c][half], spread4(b, s.code(r, i, 4 * (g + half)), s.lanes))
                sums[r, c] = b.add(sums[r, c], pairs) if (g + half) % groups else pairs
            sums = dict(zip(sums, pinned(b, sums.values()), strict=True))
        if (g + 2) % groups == 0:
            wide = {cell: pair_sums(b, v) for cell, v in sums.items()}
            dots = {cell: b.add(dots[cell], v) for cell, v in wide.items()} if dots else wide
    return {(r, c): b.add(v, first[r]) if first else v for (r, c), v in dots.items()}


# ---------------------------------------------------------------- 5 bits


def q5_0(s):
    """acc = fma(float(dot), w_scale * a_scale, acc), codes minus 16: bias is -128 * sum, so bias >> 3 is -16 * sum."""
    return _with_zero_points(s, dots_u5, Q5_0_BYTES, 3)


def dots_u5(s, i, start, first):
    """`dots_u4` with codes 0..31: fifth bits, then the low ones.

    Byte j of a feature's four has in bit g the fifth bit of code 4 g + j. AVX2's sums of pairs stay below
    4 * 2 * 31 * 127 = 31496 over half a block.
    """
    b, fifths = s.b, [s.codes(c, start, 0) for c in range(s.cols)]

    def columns(g):
        low = [nibbles(b, s.codes(c, start, 64 + 32 * g)) for c in range(s.cols)]
        return [
            [b.or_(v, fifth_bit(b, bits, g + half)) for half, v in enumerate(pair)]
            for pair, bits in zip(low, fifths, strict=True)
        ]

    return unsigned_dots(s, i, columns, first, 4)


def fifth_bit(b, v, g):
    """Bit g of every byte, moved to bit 4."""
    bits = words(b, v)
    if g != 4:
        bits = (b.shl if g < 4 else b.lshr)(bits, constant(bits.type, abs(4 - g)))
    return b.and_(b.bitcast(bits, v.type), constant(v.type, 16))


# ---------------------------------------------------------------- a scale and a minimum for 32 weights


def q4_1(s):
    """acc = fma(-m / 128, float(bias) * a_scale, fma(float(dot), d * a_scale, acc)), codes 0..15."""
    return _with_minima(s, dots_u4, Q4_1_BYTES)


def q5_1(s):
    """The same with codes 0..31."""
    return _with_minima(s, dots_u5, Q5_1_BYTES)


def _with_minima(s, dots, num_bytes):
    b = s.b

    def block(i, acc):
        start = b.mul(i, s.int(num_bytes))
        found = dots(s, i, b.add(start, s.int(64)), None)
        acc = scale_add(s, acc, found, feature_halves(s, start, 0), i)
        return minimum_add(s, acc, [b.fmul(m, constant(m.type, -(2.0**-7))) for m in feature_halves(s, start, 32)], i)

    return s.blocks(32, block, num_bytes)


def feature_halves(s, start, offset):
    """A float16 for each feature, at start + offset of every panel, as float32."""
    b = s.b
    return [
        halves_f32(b, moved(b, moved(b, w, start), offset + 2 * first), s.lanes)
        for w, first in zip(s.w, s.first, strict=True)
    ]


def minimum_add(s, acc, minima, i):
    """acc = fma(minima, float(bias) * a_scale, acc), cell by cell."""
    b, made = s.b, {}
    for r in range(s.rows):
        bias = b.fmul(b.sitofp(read(b, s.bias(r, i), I32, 4), F32), read(b, s.a_scale(r, i), F32, 4))
        for c in range(s.cols):
            made[r, c] = fma(b, minima[c], splat(b, bias, s.floats), acc[r, c])
    return made
