"""Prints digests of integer linear layers, compiled for another target or with another target's instructions.

    python -m tests.ops.code_target VARIANT

VARIANT native: whatever NUMBA_CPU_NAME says; "avx512", "avx_vnni", "generic": as in `tests.ops.linear_target`.
"""

import hashlib
import sys

from tests.ops.linear_target import pretend, spell_out


def digests():
    """[digest of a layer's output] for one plane of codes and for two, on inputs that are the same in every process."""
    from tests.ops import test_code_linear as cases

    made = [cases.extreme_layer(grid).run("cpu", num_threads=2) for grid in cases.ENDS[1:3]]
    return [hashlib.sha256(out.tobytes()).hexdigest()[:16] for out in made]


if __name__ == "__main__":
    if sys.argv[1] != "native":
        pretend("avx512_vnni" if sys.argv[1] == "avx512" else sys.argv[1], sys.argv[1] == "avx512", False)
    if sys.argv[1] == "avx512":
        spell_out()
    print(*digests())
