"""Prints a digest of scores for each format, compiled for the target that NUMBA_CPU_NAME names.

python -m tests.ops.sampling.score_target FORMAT...
"""

import hashlib
import sys

import numpy as np

from lockstep.ops.sampling.score_cpu import CPU
from lockstep.runtime.backend import OpTable

ROWS, VOCABULARY = 9, 4100


def digest(format: str, table: OpTable) -> str:
    """Digest of scores of inputs that are the same in every process; some logits of the last rows are denormal."""
    from tests.ops.linear import test_linear
    from tests.ops.sampling import test_score

    test_linear.RNG = np.random.default_rng(8)
    part, rng = test_linear.stored(format, VOCABULARY, test_linear.narrow(format)), np.random.default_rng(9)
    x = (3 * rng.standard_normal((ROWS, part.shape[1]))).astype(np.float32)
    base = x + np.float32(0.1) * rng.standard_normal(x.shape).astype(np.float32)
    x[-1], base[-2:] = x[-1] * np.float32(2.0**-126), base[-2:] * np.float32(2.0**-124)
    out = test_score.run(table, x, part, rng.integers(-1, VOCABULARY, ROWS), base, num_threads=2)
    return hashlib.sha256(out.tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        print(chosen, digest(chosen, CPU))
