"""Linear tiles of the K-quants: blocks of 256 weights with small integer scales, laid out as formats/pack_k.py says."""

from lockstep.runtime.emit import bytes_f32, fma, moved, pinned, read, spread, spread4, vector, words
from lockstep.runtime.simd import F32, I8, I32, call, constant
from lockstep.runtime.tiles_dots import (
    WIDE,
    dots_u4,
    dots_u5,
    feature_halves,
    maddubs,
    maddwd,
    minimum_add,
    nibbles,
    scale_add,
)

Q4_K_BYTES, Q5_K_BYTES, Q6_K_BYTES = 2368, 2880, 3392  # of a panel, for 256 k


def _block(s, i, num_bytes):
    """Start of the block of 256 that holds block i of 32, and i's number in it."""
    return s.b.mul(s.b.lshr(i, s.int(3)), s.int(num_bytes)), s.b.and_(i, s.int(7))


def _inside(s, start, j, size):
    """start + j * size."""
    return s.b.add(start, s.b.mul(j, s.int(size)))


def q4_k(s):
    """acc = fma((dmin * m) / 128, float(bias) * a_scale, fma(float(dot), (d * sc) * a_scale, acc))."""
    return _with_minima(s, dots_u4, Q4_K_BYTES, 256)


def q5_k(s):
    """The same with codes 0..31."""
    return _with_minima(s, dots_u5, Q5_K_BYTES, 320)


def _with_minima(s, dots, num_bytes, code_bytes):
    """code_bytes: of the codes of 32 k in a panel, which follow the scales."""
    b = s.b

    def block(i, acc):
        start, j = _block(s, i, num_bytes)
        found = dots(s, i, b.add(_inside(s, start, j, code_bytes), s.int(320)), None)
        small = _inside(s, start, j, 16)
        acc = scale_add(s, acc, found, _products(s, start, 0, small, 64), i)
        minima = [b.fmul(v, constant(v.type, 2.0**-7)) for v in _products(s, start, 32, small, 192)]
        return minimum_add(s, acc, minima, i)

    return s.blocks(32, block, num_bytes // 8)


def _products(s, start, offset, small, small_offset):
    """A float16 for each feature, at start + offset, times a byte for each, for every panel."""
    b, made = s.b, []
    for half, w, first in zip(feature_halves(s, start, offset), s.w, s.first, strict=True):
        byte = bytes_f32(b, moved(b, moved(b, w, small), small_offset + first), s.lanes)
        made.append(b.fmul(half, byte))
    return made


def q6_k(s):
    """acc = fma(float(sc0 * dot0 + sc1 * dot1), d * a_scale, acc): a scale for the first 16 and one for the last."""
    dots, b = _q6_avx2 if s.how == "avx2" else _q6_wide, s.b

    def block(i, acc):
        start, j = _block(s, i, Q6_K_BYTES)
        for c, w in enumerate(s.w):
            low, high, scales = (
                moved(b, moved(b, w, _inside(s, start, j, size)), offset + each * s.first[c])
                for size, offset, each in ((384, 320, 4), (384, 576, 4), (32, 64, 1))
            )
            found = dots(s, i, low, high, [_scale(s, scales, half) for half in (0, 1)])
            d = read(b, moved(b, moved(b, w, start), 4 * s.first[c]), s.floats, 4 * s.lanes)
            for r in range(s.rows):
                factor = b.fmul(d, spread(b, s.a_scale(r, i), F32, s.lanes))
                acc[r, c] = fma(b, b.sitofp(found[r], s.floats), factor, acc[r, c])
        return acc

    return s.blocks(32, block, Q6_K_BYTES // 8)


def _scale(s, scales, half):
    """The int8 scales of a half block, as int32."""
    return s.b.sext(read(s.b, moved(s.b, scales, 16 * half), vector(I8, s.lanes), s.lanes), s.ints)


def _two_codes(s, low, high, half, first):
    """Codes 0..63 of groups `first` (0 or 2) and first + 1 of a half block: nibbles of low, two bits of high."""
    b, kind = s.b, vector(I8, 4 * s.lanes)
    nibble = nibbles(b, read(b, moved(b, low, 128 * half + 32 * first), kind, 4 * s.lanes))
    bits = words(b, read(b, moved(b, high, 64 * half), kind, 4 * s.lanes))
    shift = lambda move, count: b.bitcast(move(bits, constant(bits.type, count)) if count else bits, kind)
    upper = (shift(b.shl, 4), shift(b.shl, 2)) if first == 0 else (shift(b.shl, 0), shift(b.lshr, 2))
    return [b.or_(n, b.and_(u, constant(kind, 0x30))) for n, u in zip(nibble, upper, strict=True)]


def _zero_point(s, scale):
    """Pairs of int16, -32 times the two scales: what codes 0..63 instead of -32..31 add too much per activation."""
    b = s.b
    both = b.or_(b.and_(scale[0], constant(s.ints, 0xFFFF)), b.shl(scale[1], constant(s.ints, 16)))
    return b.mul(words(b, both), constant(words(b, both).type, -32))


def _q6_wide(s, i, low, high, scale):
    b, dot, totals = s.b, WIDE[s.how], [None] * s.rows
    for half in (0, 1):
        dots = [constant(s.ints, 0)] * s.rows
        for first in (0, 2):
            codes = _two_codes(s, low, high, half, first)
            for r in range(s.rows):
                for g in (0, 1):
                    dots[r] = dot(b, dots[r], codes[g], spread4(b, s.code(r, i, 16 * half + 4 * (first + g)), s.lanes))
        products = [b.mul(v, scale[half]) for v in dots]
        totals = pinned(b, [b.add(t, v) for t, v in zip(totals, products, strict=True)] if half else products)
    zero_point = _zero_point(s, scale)
    sums = [words(b, spread(b, s.sums(r, i), I32, s.lanes)) for r in range(s.rows)]
    return [PAIRS[s.how](b, total, zero_point, both) for total, both in zip(totals, sums, strict=True)]


def _pairs_vnni(b, acc, x, y):
    name = f"llvm.x86.avx512.vpdpwssd.{32 * acc.type.count}"
    return call(b, name, acc.type, [acc, b.bitcast(x, acc.type), b.bitcast(y, acc.type)])


def _pairs_anywhere(b, acc, x, y):
    """acc + x[2i] * y[2i] + x[2i + 1] * y[2i + 1] for int16 x and y."""
    wide = acc.type
    for shift in (16, 0):
        parts = [b.ashr(b.shl(b.bitcast(v, wide), constant(wide, shift)), constant(wide, 16)) for v in (x, y)]
        acc = b.add(acc, b.mul(*parts))
    return acc


PAIRS = {"avx512_vnni": _pairs_vnni, "avx_vnni": _pairs_vnni, "sdot": _pairs_anywhere, "generic": _pairs_anywhere}


def _q6_avx2(s, i, low, high, scale):
    """Pairs of two groups stay below 4 * 63 * 127 = 32004; PMADDWD multiplies by the scale as it widens."""
    b = s.b
    zero_point = _zero_point(s, scale)
    totals = [maddwd(b, zero_point, words(b, spread(b, s.sums(r, i), I32, s.lanes))) for r in range(s.rows)]
    for half in (0, 1):
        twice = b.or_(b.and_(scale[half], constant(s.ints, 0xFFFF)), b.shl(scale[half], constant(s.ints, 16)))
        for first in (0, 2):
            codes = _two_codes(s, low, high, half, first)
            for r in range(s.rows):
                places = [s.code(r, i, 16 * half + 4 * (first + g)) for g in (0, 1)]
                sums = [maddubs(b, code, spread4(b, place, s.lanes)) for code, place in zip(codes, places, strict=True)]
                totals[r] = b.add(totals[r], maddwd(b, b.add(*sums), words(b, twice)))
            totals = pinned(b, totals)
    return totals
