"""Prints digests of integer linear layers, compiled for another target or with another target's instructions.

    python -m tests.ops.integer.code_target VARIANT NAME...

VARIANT "native": the target that NUMBA_CPU_NAME names; "avx512", "avx_vnni", "generic": as in
`tests.ops.linear.linear_target`.
NAME: "u8", "i16" or "fixed".
"""

import hashlib
import sys

from tests.ops.linear.linear_target import pretend, spell_out


def digest(name):
    """Digest of a layer's output on inputs that are the same in every process."""
    from tests.ops.integer import test_code_fixed
    from tests.ops.integer import test_code_linear as cases

    grids = dict(u8=cases.ENDS[1], i16=cases.ENDS[2])
    if name in grids:
        out = cases.extreme_layer(grids[name]).run("cpu", num_threads=2)
    else:
        out = test_code_fixed.run(cases.layer(cases.I16, 13), test_code_fixed.OUTS[2])
    return hashlib.sha256(out.tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    if sys.argv[1] != "native":
        pretend("avx512_vnni" if sys.argv[1] == "avx512" else sys.argv[1], sys.argv[1] == "avx512", False)
    if sys.argv[1] == "avx512":
        spell_out()
    print(*map(digest, sys.argv[2:]))
