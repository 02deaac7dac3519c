"""Linear tiles of 4-, 6- and 8-bit weights: exact integer dots over blocks of 32, then the block's scales.

Which instruction makes the dots is the target's (`targets.int_dot`). The integers are exact, so all give the same bits;
the float32 steps that follow are those of the definitions in `ops/linear.py`.
"""
from llvmlite import ir

from lockstep.runtime.emit import cut, fma, halves_f32, join, moved, pinned, spread, spread4, vector, words
from lockstep.runtime.simd import F32, I1, I16, I32, call, constant


def vnni512(b, acc, w, a):
    return call(b, "llvm.x86.avx512.vpdpbusd.512", acc.type, [acc, w, a])


def vnni256(b, acc, w, a):
    return call(b, "llvm.x86.avx512.vpdpbusd.256", acc.type, [acc, w, a])


def sdot(b, acc, w, a):
    """Signed by signed, four lanes at a time."""
    name, quarter = "llvm.aarch64.neon.sdot.v4i32.v16i8", vector(I32, 4)
    return join(b, *[call(b, name, quarter, [cut(b, acc, 4 * h, 4), cut(b, w, 16 * h, 16), cut(b, a, 16 * h, 16)])
                     for h in (0, 1)])


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


WIDE = {"avx512_vnni": vnni512, "avx_vnni": vnni256, "sdot": sdot, "generic": widened}


# ---------------------------------------------------------------- 8 bits

def q8_0(s):
    """acc = fma(float(dot), w_scale * a_scale, acc)."""
    dots = _q8_avx2 if s.how == "avx2" else _q8_wide
    return s.blocks(32, lambda i, acc: scale_add(s, acc, dots(s, i), w_scales(s, i), i), 512, 32)


def w_scales(s, i):
    """The weights' float16 scales of block i, as float32, for every panel."""
    start = s.b.mul(i, s.int(32))
    places = [moved(s.b, moved(s.b, place, start), 2 * first) for place, first in zip(s.scales, s.first)]
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
        held = dict(zip([*dots, *excess], pinned(b, [*dots.values(), *excess.values()])))
        dots, excess = {k: held[k] for k in dots}, {k: held[k] for k in excess}
    excess = {c: pair_sums(b, v) for c, v in excess.items()}
    return {(r, c): b.sub(v, excess[c]) for (r, c), v in dots.items()}


# ---------------------------------------------------------------- 4 bits

def q4_0(s):
    """acc = fma(float(dot), w_scale * a_scale, acc), codes minus 8: bias is -128 * sum, so bias >> 4 is -8 * sum."""

    def block(i, acc):
        start = s.b.mul(i, s.int(256))
        return scale_add(s, acc, dots_u4(s, i, start, zero_points(s, i, 4)), w_scales(s, i), i)

    return s.blocks(32, block, 256, 32)


def nibbles(b, v):
    """Two groups of codes 0..15 from bytes: the low halves, then the high ones."""
    high = b.bitcast(b.lshr(words(b, v), constant(words(b, v).type, 4)), v.type)
    return b.and_(v, constant(v.type, 15)), b.and_(high, constant(v.type, 15))


def dots_u4(s, i, start, first):
    """Dots of a block with codes 0..15, `start` bytes into the panels, on top of first[row] (or of zero)."""
    return (_u4_avx2 if s.how == "avx2" else _u4_wide)(s, i, start, first)


def _u4_wide(s, i, start, first):
    b, dot = s.b, WIDE[s.how]
    dots = {(r, c): first[r] if first else constant(s.ints, 0) for r, c in s.cells}
    for g in range(0, 8, 2):
        columns = [nibbles(b, s.codes(c, start, 32 * g)) for c in range(s.cols)]
        for half in (0, 1):
            for r in range(s.rows):
                a = spread4(b, s.code(r, i, 4 * (g + half)), s.lanes)
                for c in range(s.cols):
                    dots[r, c] = dot(b, dots[r, c], columns[c][half], a)
    return dots


def _u4_avx2(s, i, start, first):
    """16-bit sums of pairs: over a block of 32 they stay below 8 * 2 * 15 * 127 = 30480."""
    b, sums = s.b, {}
    for g in range(0, 8, 2):
        columns = [nibbles(b, s.codes(c, start, 32 * g)) for c in range(s.cols)]
        for half in (0, 1):
            for r, c in s.cells:
                pairs = maddubs(b, columns[c][half], spread4(b, s.code(r, i, 4 * (g + half)), s.lanes))
                sums[r, c] = b.add(sums[r, c], pairs) if g + half else pairs
            sums = dict(zip(sums, pinned(b, sums.values())))
    dots = {cell: pair_sums(b, v) for cell, v in sums.items()}
    return {(r, c): b.add(v, first[r]) if first else v for (r, c), v in dots.items()}
