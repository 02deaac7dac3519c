"""The soft cap of logits: the fast kernel. Bound by arithmetic: two divisions and an exponential for each logit, which
is a small part of the product that made it."""

from lockstep.native.kernel import variant
from lockstep.native.simd import load, store
from lockstep.ops.sampling.soft_cap import SoftCap, capped
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

BLOCK = 4096  # bytes that one thread takes at a time
ONE_THREAD = None  # constant of a variant: whether one thread caps all rows


def cap_blocks(op, step, thread, num_threads):
    """Rows lie end to end, so blocks of all of them are dealt to threads in turn."""
    a = SoftCap.read(op)
    num_bytes = 4 * a.width * num_rows(op, step)
    for task in strided((num_bytes + BLOCK - 1) // BLOCK, thread, num_threads, ONE_THREAD):
        for i in range(BLOCK * task, min(BLOCK * task + BLOCK, num_bytes), 64):
            store(a.out + i, capped(load(a.logits + i), a.cap))


soft_cap = variant(cap_blocks, "soft_cap", ONE_THREAD=False)
soft_cap_per_token = variant(cap_blocks, "soft_cap_per_token", ONE_THREAD=True)

CPU = {"soft_cap": Implementation(soft_cap)}
PER_TOKEN = {"soft_cap": Implementation(soft_cap_per_token)}
