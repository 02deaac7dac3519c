"""Dots of four bytes, as each target has them: exact integers, so that all give the same bits (`targets.int_dot`)."""

from llvmlite import ir

from lockstep.native.emit import by_halves, vector
from lockstep.native.simd import I1, I16, I32, call, constant


def vnni(b, acc, w, a):
    return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}", acc.type, [acc, w, a])


def sdot(b, acc, w, a):
    """Signed by signed, four lanes at a time."""
    return by_halves(b, lambda b, *v: call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", v[0].type, [*v]), acc, w, a)


def widened(b, acc, w, a):
    """Signed by signed on any target: every fourth product, four times."""
    wide_type = vector(I32, w.type.count)
    products = b.mul(b.sext(w, wide_type), b.sext(a, wide_type))
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


def absolute(b, w):
    return call(b, f"llvm.abs.v{w.type.count}i8", w.type, [w, constant(I1, 0)])


WIDE = {"avx512_vnni": vnni, "avx_vnni": vnni, "sdot": sdot, "generic": widened}
