"""Prints digests of integer linear layers, compiled for another target or with another target's instructions.

    python -m tests.ops.integer.code_target VARIANT NAME...

VARIANT "native": the target that NUMBA_CPU_NAME names; the others are those of `tests.ops.variants`.
NAME: "u8", "i16" or "fixed".
"""

import hashlib
import sys

from tests.ops.variants import become


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
        become(sys.argv[1])
    print(*map(digest, sys.argv[2:]))
