"""Penalties, biases and masks on logits, before a token is chosen: the definition.

    adjusted = mask(logits - penalties + bias)        only in rows whose sampling record has an adjustment

Rows without an adjustment are neither read nor written.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array, int_array
from lockstep.native.numbers import carray, float32, int32, int64
from lockstep.native.simd import fma, minimum, peek, to_f32
from lockstep.ops.sampling.sample import ADJUSTMENT, MASK, NUM_BANNED, NUM_SEEN, RECORD_BYTES, ZERO
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import StepBlock, num_rows

FORBIDDEN, HIGHEST = np.float32(-np.inf), np.float32(3.4028235e38)
# an adjustment, the same in all steps of a request, with addresses of seen int32 [.., 2], bias_ids int32, bias float32
# and banned int32
ADJUSTMENT_RECORD = np.dtype(
    [(name, np.int64) for name in ("seen", "bias_ids", "bias", "banned")]
    + [("num_bias", np.int32)]
    + [(name, np.float32) for name in ("repetition", "presence", "frequency")]
)
SEEN, BIAS_IDS, BIAS, BANNED, NUM_BIAS, REPETITION, PRESENCE, FREQUENCY = (
    ADJUSTMENT_RECORD.fields[name][1] for name in ADJUSTMENT_RECORD.names
)


class AdjustLogits(Operands):
    """out = logits, adjusted, in rows with an adjustment; rows are `width` wide, with vocab_size tokens."""

    rules = ("vocab_size <= width",)
    out: Tensor = output("width", on_request=True)
    logits: Tensor = rows("width")
    vocab_size: int
    width: int


class Penalties(NamedTuple):
    """The penalties of seen tokens; see `adjust_row`."""

    repetition: float
    presence: float
    frequency: float


class Bias(NamedTuple):
    """Biases of some logits: token ids int32 [B] without repeats, and what is added, float32 [B]."""

    ids_B: np.ndarray
    values_B: np.ndarray


@definition
def adjust_row(logits_V, seen_N2, penalties, bias, banned_C, mask_W, out_V):
    """Adjusts a row of logits, in this order: repetition, frequency, presence, bias, mask, banned tokens.

    Shapes: logits, out [V] float32 without NaN or +inf; seen [N, 2] int32: a token of the prompt or the output, and how
      often it is in the output up to here, of which a token's last entry counts; banned [C] int32 tokens; mask [W]
      int32, whose bit i % 32 of word i // 32 allows token i, or no words, which allow all.
    Units: repetition, at least 0.01, divides a positive logit of a seen token and multiplies any other; frequency is
      subtracted for each time that the output has the token, presence once; 1, 0 and 0 change nothing. Tokens from V on
      are passed over: a draft head may have only the first tokens of the vocabulary.
    Error: an ulp of each step.
    Order: see `penalized`; then out + bias; a token that is not allowed is minus infinity.
    Source: Keskar et al. 2019 (repetition); the OpenAI API reference (frequency, presence, bias).
    """
    for i in range(logits_V.size):
        out_V[i] = logits_V[i]
    for n in range(seen_N2.shape[0]):
        i = seen_N2[n, 0]
        if i < logits_V.size:
            out_V[i] = penalized(logits_V[i], penalties, seen_N2[n, 1])
    for b in range(bias.ids_B.size):
        if bias.ids_B[b] < logits_V.size:
            out_V[bias.ids_B[b]] += bias.values_B[b]
    for i in range(logits_V.size):
        if mask_W.size > 0 and mask_W[i // 32] >> i % 32 & 1 == 0:
            out_V[i] = FORBIDDEN
    for c in range(banned_C.size):
        if banned_C[c] < logits_V.size:
            out_V[banned_C[c]] = FORBIDDEN


@inlined
def penalized(x, penalties, num_output):
    """The logit of a seen token that is in the output num_output times. At most the largest finite number."""
    x = minimum(x / penalties.repetition if x > ZERO else x * penalties.repetition, HIGHEST)
    if num_output > 0:
        x = fma(-penalties.frequency, to_f32(num_output), x) - penalties.presence
    return minimum(x, HIGHEST)


@inlined
def penalties_of(adjustment):
    """The Penalties of an ADJUSTMENT_RECORD."""
    return Penalties(
        peek(adjustment + REPETITION, float32),
        peek(adjustment + PRESENCE, float32),
        peek(adjustment + FREQUENCY, float32),
    )


@inlined
def _ints(address, shape):
    return carray(int_array(address), shape)


@kernel
def _run(op, step, thread, num_threads):
    a = AdjustLogits.read(op)
    for r in range(num_rows(op, step) if thread == 0 else 0):
        record, row, V = StepBlock.read(step).sampling + RECORD_BYTES * r, 4 * a.width * r, a.vocab_size
        adjustment, mask = peek(record + ADJUSTMENT, int64), peek(record + MASK, int64)
        if adjustment != 0:
            B = peek(adjustment + NUM_BIAS, int32)
            bias_B = carray(float_array(peek(adjustment + BIAS, int64)), (B,))
            adjust_row(
                carray(float_array(a.logits + row), (V,)),
                _ints(peek(adjustment + SEEN, int64), (peek(record + NUM_SEEN, int32), 2)),
                penalties_of(adjustment),
                Bias(_ints(peek(adjustment + BIAS_IDS, int64), (B,)), bias_B),
                _ints(peek(adjustment + BANNED, int64), (peek(record + NUM_BANNED, int32),)),
                _ints(mask, ((V + 31) // 32 if mask != 0 else 0,)),
                carray(float_array(a.out + row), (V,)),
            )


REFERENCE = {"adjust_logits": Implementation(_run)}
