"""Prints a digest of each linear layer's output, compiled for another target or with another target's instructions.

    python -m tests.ops.linear.linear_target VARIANT FORMAT...

FORMAT: the name of a format, with _per_token for its kernel of one row, which compiles in a fraction of the time.
VARIANT native: the target of NUMBA_CPU_NAME; the others run on any machine (tests/ops/variants.py).
"""

import hashlib
import sys

import numpy as np

from tests.ops.variants import become

ROWS, N = 27, 75


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
    if sys.argv[1] != "native":
        become(sys.argv[1])
    for chosen in sys.argv[2:]:
        print(chosen, digest(chosen))
