"""Targets that a process pretends to have on this machine, whose own instructions general ones stand for.

"avx512": AVX512-VNNI and BF16, 2 panels of 16 lanes. "i8mm": ARM's SMMLA. "avx_vnni", "avx2" and "generic" (without a
dot instruction) are as they are.
"""

from dataclasses import replace

from llvmlite import ir

from lockstep.native.emit import by_halves, cut, fma, join, vector, words
from lockstep.native.isa import rows_in_pairs, x86
from lockstep.native.simd import F32, I32, call, constant
from lockstep.native.targets import AVX2, AVX512_BF16, AVX_VNNI, I8MM, OTHER, Target
from tests.targets import pretend


def vpdpbusd(b, acc, w, a):
    # even and odd bytes as int16, which cannot overflow
    halves = []
    for h in (0, 1):
        w16, a16 = (words(b, cut(b, v, 32 * h, 32)) for v in (w, a))
        eight = constant(w16.type, 8)
        even = x86.maddwd(b, b.and_(w16, constant(w16.type, 255)), b.ashr(b.shl(a16, eight), eight))
        halves.append(b.add(even, x86.maddwd(b, b.lshr(w16, eight), b.ashr(a16, eight))))
    return b.add(acc, join(b, *halves))


def vdpbf16ps(b, acc, x, w):
    as_floats = lambda v: b.bitcast(v, vector(F32, 16))
    upper = lambda v: as_floats(b.and_(v, constant(v.type, -65536)))
    lower = lambda v: as_floats(b.shl(v, constant(v.type, 16)))
    return fma(b, lower(x), lower(w), fma(b, upper(x), upper(w), acc))


def in_halves(b, tables, codes):
    return by_halves(b, x86.shuffle, tables, codes) if codes.type.count == 64 else x86.shuffle(b, tables, codes)


def smmla(b, acc, rows, w):
    """SMMLA as Arm's manual says: acc[2 r + n] += the dot of eight bytes, r of rows with n of w."""
    for r in (0, 1):
        for n in (0, 1):
            of_row, of_feature = (b.sext(cut(b, v, 8 * m, 8), vector(I32, 8)) for v, m in ((rows, r), (w, n)))
            total = call(b, "llvm.vector.reduce.add.v8i32", I32, [b.mul(of_row, of_feature)])
            place = ir.Constant(I32, 2 * r + n)
            acc = b.insert_element(acc, b.add(b.extract_element(acc, place), total), place)
    return acc


def neighbours(b, v):
    pick = lambda n: b.shuffle_vector(v, v, ir.Constant(vector(I32, 4), [2 * lane + n for lane in range(4)]))
    return b.add(pick(0), pick(1))


SPELT_OUT = {"_smmla": smmla, "sdot": OTHER.dot, "_neighbours": neighbours}  # of `rows_in_pairs`
TARGETS: dict[str, Target] = {
    "avx512": replace(AVX512_BF16, dot=vpdpbusd, pair_dot=OTHER.pair_dot, bf16_dot=vdpbf16ps, shuffle=in_halves),
    "i8mm": replace(I8MM, dot=OTHER.dot, pair_dot=OTHER.pair_dot, shuffle=None),
    "avx_vnni": AVX_VNNI,
    "avx2": AVX2,
    "generic": OTHER,
}


def become(variant: str) -> None:
    """Makes every module use a variant's target; must be called before the modules are imported."""
    pretend(TARGETS[variant])
    if variant == "avx512":
        x86.barrier = OTHER.machine.barrier  # there may be no register of this width
    for name, function in SPELT_OUT.items():
        setattr(rows_in_pairs, name, function)
