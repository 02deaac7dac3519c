"""Penalties, biases and masks: the fast kernel. Bound by memory: an adjusted row is read once and written once.

Threads share the copying and masking of rows by chunks of the vocabulary; then one thread for each row visits the few
tokens that were seen or have a bias. The mask may go first: minus infinity stays whatever is added to it.
"""

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.numbers import float32, int32, int64
from lockstep.native.simd import (
    bit_and,
    bit_xor,
    lane_numbers,
    load,
    peek,
    poke,
    shift_right,
    store,
    to_f32,
    where_below,
)
from lockstep.ops.sampling.adjust_logits import (
    BANNED,
    BIAS,
    BIAS_IDS,
    FORBIDDEN,
    NUM_BIAS,
    SEEN,
    AdjustLogits,
    penalized,
    penalties_of,
)
from lockstep.ops.sampling.sample import ADJUSTMENT, CHUNK, MASK, NUM_BANNED, NUM_SEEN, RECORD_BYTES
from lockstep.ops.sampling.sample_cpu import wait_for_all
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, num_rows

HALF = np.float32(0.5)


@kernel
def adjust_logits(op, step, thread, num_threads):
    """Copies, waits for all threads on the op's own counter, then adjusts tokens."""
    a, R, records, any_adjusted = AdjustLogits.read(op), num_rows(op, step), StepBlock.read(step).sampling, False
    V, C, row = a.vocab_size, (a.vocab_size + CHUNK - 1) // CHUNK, 4 * a.width
    for r in range(R):
        any_adjusted = any_adjusted or peek(records + RECORD_BYTES * r + ADJUSTMENT, int64) != 0
    if any_adjusted:
        for task in range(thread, R * C, num_threads):
            r, c = task // C, task % C
            if peek(records + RECORD_BYTES * r + ADJUSTMENT, int64) != 0:
                copy_chunk(a.logits + row * r, V, peek(records + RECORD_BYTES * r + MASK, int64), c, a.out + row * r)
        wait_for_all(op, num_threads)
        for r in range(thread, R, num_threads):
            if peek(records + RECORD_BYTES * r + ADJUSTMENT, int64) != 0:
                adjust_tokens(a.logits + row * r, V, records + RECORD_BYTES * r, a.out + row * r)


@inlined
def copy_chunk(logits, V, mask, c, out):
    """Copies a chunk, without the tokens that the mask forbids. Whole vectors: up to 60 bytes past the end."""
    for i in range(CHUNK * c, min(CHUNK * c + CHUNK, V), 16):
        x = load(logits + 4 * i)
        if mask != 0:
            bits = int64(peek(mask + 4 * (i // 32), int32)) >> i % 32
            allowed = bit_and(shift_right(bit_xor(bit_and(lane_numbers(), 0), bits), lane_numbers()), 1)
            x = where_below(to_f32(allowed), HALF, FORBIDDEN, x)
        store(out + 4 * i, x)


@inlined
def adjust_tokens(logits, vocab_size, record, out):
    """Penalties of seen tokens, biases, and banned tokens."""
    adjustment = peek(record + ADJUSTMENT, int64)
    seen, banned = peek(adjustment + SEEN, int64), peek(adjustment + BANNED, int64)
    for n in range(peek(record + NUM_SEEN, int32)):
        i, num_output = 4 * int64(peek(seen + 8 * n, int32)), peek(seen + 8 * n + 4, int32)
        if i < 4 * vocab_size and peek(out + i, float32) != FORBIDDEN:
            poke(out + i, penalized(peek(logits + i, float32), penalties_of(adjustment), num_output))
    for b in range(peek(adjustment + NUM_BIAS, int32)):
        i = 4 * int64(peek(peek(adjustment + BIAS_IDS, int64) + 4 * b, int32))
        if i < 4 * vocab_size:
            poke(out + i, peek(out + i, float32) + peek(peek(adjustment + BIAS, int64) + 4 * b, float32))
    for n in range(peek(record + NUM_BANNED, int32)):
        i = 4 * int64(peek(banned + 4 * n, int32))
        if i < 4 * vocab_size:
            poke(out + i, FORBIDDEN)


CPU = {"adjust_logits": Implementation(adjust_logits, waits=True)}
