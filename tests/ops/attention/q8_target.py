"""Prints digests of attention over an 8-bit cache, and of the pages, computed with another target's instructions.

    python -m tests.ops.attention.q8_target VARIANT

VARIANT native: the target of NUMBA_CPU_NAME; "avx_vnni", "avx2", "generic": dots of bytes by these instructions.
"""

import hashlib
import sys

from tests.ops.variants import become


def digests():
    """[digest of attention's outputs, digest of queries and pages]; the inputs are the same in every process."""
    from lockstep.ops import BACKENDS
    from tests.ops.attention import test_attention, test_kv_cache

    batch = test_attention.Batch([1, 65, 7, 30], [1, 65, 1027, 90], 7, 1, 80, "q8", 70)
    inputs = test_kv_cache.Inputs(*test_kv_cache.SHAPES["odd rotation, normed"], kv_dtype="q8")
    outputs = batch.run(BACKENDS["cpu"], 2), inputs.run(BACKENDS["cpu"], 2)
    return [hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16] for arrays in outputs]


if __name__ == "__main__":
    if sys.argv[1] != "native":
        become(sys.argv[1])
    print(*digests())
