"""Prints a digest of each linear layer's output, compiled for another target or with another target's instructions.

    python -m tests.ops.linear.linear_target VARIANT FORMAT...

FORMAT: the name of a format, with _per_token for its kernel of one row, which compiles in a fraction of the time.
VARIANT native: the target of NUMBA_CPU_NAME. The other variants run on any machine: "avx512" (AVX512-VNNI and BF16, 2
panels of 16 lanes) is the code for that target with its own instructions replaced by general ones, "generic" the code
for a target without a dot instruction.
"""

import hashlib
import sys
from dataclasses import replace

import numpy as np

from lockstep.native.isa import x86
from lockstep.native.targets import AVX512_BF16, OTHER
from tests.targets import pretend

ROWS, N = 9, 75


def spelt_out():
    """AVX-512 with general instructions, with the same results, in place of its own."""
    from lockstep.native.emit import by_halves, cut, fma, join, vector, words
    from lockstep.native.simd import F32, constant

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

    return replace(AVX512_BF16, dot=vpdpbusd, pair_dot=OTHER.pair_dot, bf16_dot=vdpbf16ps, shuffle=in_halves)


def digest(name):
    """Digest of the output of a linear layer in a FORMAT; the inputs are the same in every process."""
    from lockstep.ops.linear import linear_cpu
    from tests.ops.linear import test_linear

    test_linear.RNG = np.random.default_rng(7)
    format = name.removesuffix("_per_token")
    table, K = linear_cpu.CPU if format == name else linear_cpu.PER_TOKEN, test_linear.narrow(format)
    part = [test_linear.stored(format, N, K)]
    out = test_linear.run(table, format, test_linear.RNG.standard_normal((ROWS, K)).astype(np.float32), part)
    return hashlib.sha256(out.tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    if sys.argv[1] == "avx512":
        pretend(spelt_out())
        x86.barrier = OTHER.machine.barrier  # there may be no register of this width
    elif sys.argv[1] == "generic":
        pretend(OTHER)
    for chosen in sys.argv[2:]:
        print(chosen, digest(chosen))
