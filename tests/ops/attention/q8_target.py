"""Prints a digest of attention over an 8-bit cache, and of the pages, as another target's instructions make them.

    python -m tests.ops.attention.q8_target VARIANT

VARIANT native: whatever NUMBA_CPU_NAME says; "avx_vnni", "avx2", "generic": dots of bytes made that way.
"""

import hashlib
import sys

from lockstep.native import targets


def pretend(how):
    """Makes every module ask for this target's dots; called before they are imported."""
    targets.int_dot = lambda magic=None: how
    targets.wide_registers = targets.bf16_dot = lambda magic=None: False


def digests():
    """[digest of attention's output, digest of queries and pages], on inputs that are the same in every process."""
    from lockstep.ops import BACKENDS
    from tests.ops.attention import test_attention, test_kv_cache

    batch = test_attention.Batch([1, 65, 7, 30], [1, 65, 1027, 90], 7, 1, 80, "q8", 70)
    inputs = test_kv_cache.Inputs(*test_kv_cache.SHAPES["odd rotation, normed"], "q8")
    made = batch.run(BACKENDS["cpu"], 2), inputs.run(BACKENDS["cpu"], 2)
    return [hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16] for arrays in made]


if __name__ == "__main__":
    if sys.argv[1] != "native":
        pretend(sys.argv[1])
    print(*digests())
