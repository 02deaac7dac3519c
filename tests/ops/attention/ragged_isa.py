"""Prints the target and a digest of ragged paged attention: python -m tests.ops.attention.ragged_isa.

With LOCKSTEP_ALL_TARGETS=1 (`make test-targets`) the digest includes pages of one byte, whose kernels take long to
compile.
"""

import hashlib
import os

import numpy as np

from lockstep.native.kernel import target
from lockstep.ops import ragged_paged_attention
from tests.ops.attention.ragged_cases import BF16, E4M3, E5M2, F32, I8, MIXED, Batch

BYTES = (E4M3, E5M2, I8) if os.environ.get("LOCKSTEP_ALL_TARGETS") else ()


def digest():
    """The digest of outputs; the inputs are the same in every process."""
    digest, sinks = hashlib.sha256(), np.linspace(-1, 2, 8, dtype=np.float32)
    for heads in ((4, 2, 64), (8, 1, 80), (2, 2, 48)):
        for dtype, pages_dtype in ((F32, None), (BF16, None), *((F32, dtype) for dtype in BYTES)):
            batch = Batch(*MIXED, heads, 24, dtype, pages_dtype=pages_dtype)
            for options in ({}, {"sliding_window": 20, "sinks": sinks[: heads[0]]}, {"soft_cap": 5.0}):
                digest.update(ragged_paged_attention(*batch.arguments(), sm_scale=0.2, **options).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(target()[1], digest())
