"""Scores of rows by their logits: the fast kernel. It takes the time of the linear layers that it consists of.

Threads claim (4096 tokens of the vocabulary, a few rows), the rows of the same tokens one after the other, so that
these weights are read from memory once. A claim's logits are made by the tiles of `linear_cpu` and stay in the cache:

    logits of a claim | of each row: grid, maximum and first token that has it | sums of exp and of exp * difference
    wait for all | of each row: the chunks' sums in ascending order, and the scores
"""

from typing import NamedTuple

import numpy as np
from numba import float32, int32, int64

from lockstep.ops.activations import NATIVE_BF16
from lockstep.ops.linear_cpu import (
    FORMATS,
    MAX_ROWS,
    Claim,
    Sizes,
    constants,
    merged,
    part_of_k,
    rows_at_once,
    sweep_claim,
    together,
    whole_rows,
)
from lockstep.ops.math import exp, log
from lockstep.ops.sample import CHUNK, INFINITY, LOWEST, UNKNOWN
from lockstep.ops.sample_cpu import weight
from lockstep.ops.score import (
    BASE_NLL,
    BASE_TOP,
    CHUNK_WORDS,
    DELTA_P,
    KL,
    NLL,
    NUM_SCORES,
    ONE,
    SAME_TOP,
    TOP,
    TOP_LOGPROB,
    ZERO,
    Score,
    difference,
    divergence,
    nll_of,
)
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, separate, variant
from lockstep.runtime.machine import (
    FLUSH,
    IEEE,
    fetch_add,
    kept_apart,
    set_float_control,
    stack_memory,
    wait_until,
)
from lockstep.runtime.operands import WeightArrays
from lockstep.runtime.simd import (
    fma,
    lane_numbers,
    lanes,
    load,
    max_lanes,
    maximum,
    peek,
    poke,
    sum_lanes,
    to_f32,
    where_below,
)
from lockstep.runtime.step import COUNTER, num_rows

WORDS = 4  # bytes
ROW = WORDS * (CHUNK + 16)  # from one row of a claim's logits to the next: a line more, since caches dislike 4096
MOST_ROWS = 48  # of a claim; with a base half as many, since each has two rows of logits
MEMORY_BYTES = MOST_ROWS * ROW
CLAIMS = 8  # of a thread, at least, where there are enough rows
DONE = 1 << 32  # what a thread without work adds to the counter, which counts claims below
SIXTEEN, FAR = np.float32(16), np.float32(CHUNK)
# words of a chunk in a row's scratch
HIGHEST, FIRST, SUM, BASE_HIGHEST, BASE_FIRST, BASE_SUM, CROSS = range(CHUNK_WORDS)
FORMAT = BLOCK = PANEL_BYTES = ROW_BYTES = FEW = None  # of a variant, see `linear_cpu`
MULTIPLY = None  # of a variant: what makes the logits of a claim
BF16_FEW = constants("bf16")["FEW"]


class Head(NamedTuple):
    """What `sweep_claim` wants of a layer, for some rows and a chunk of a head; out: where panel 0 would be."""

    x: int
    weight: WeightArrays
    in_features: int
    out: int
    residual: int
    width: int
    column: int


class Logits(NamedTuple):
    """Largest logit of a row (at least LOWEST), the logarithm of its sum, the token, and whether it has a softmax."""

    largest: float
    log_total: float
    token: float
    sound: bool


@merged
def multiplied(format, few, layer, sizes, claim):
    """Writes the logits of a claim."""
    sweep_claim(format, few, together, whole_rows, layer, sizes, claim)


@separate
def multiplied_pairs(layer, sizes, claim):
    """The same by pairs of bf16, which takes FLUSH mode where the target has no instruction for it."""
    kept_apart()
    sweep_claim("bf16", BF16_FEW, together, whole_rows, layer, sizes, claim)


@separate
def multiplied_flushing(format, few, layer, sizes, claim):
    """The same, and the mode: scores are not flushed."""
    kept_apart()
    set_float_control(FLUSH)
    multiplied_pairs(layer, sizes, claim)
    set_float_control(IEEE)


def _score(op, step, thread, num_threads):
    """See above; claims and the barrier count on the op's own counter."""
    a, T, K = Score.read(op), num_rows(op, step), 0
    K, C, counter, memory = a.in_features, chunks_of(a), peek(op + 8 * COUNTER, int64), stack_memory(MEMORY_BYTES)
    row, panel, num_panels = ROW_BYTES(K), K // BLOCK * PANEL_BYTES, (a.vocab_size + 15) // 16
    rows = rows_of_claim(T, C, num_threads, a.base_x != 0)
    blocks, base = (T + rows - 1) // rows, memory + MEMORY_BYTES // 2
    sizes = Sizes(row, panel, rows_at_once(row), part_of_k(K, panel, rows, FEW), num_panels)
    claim = fetch_add(counter, 1) % DONE
    while claim < blocks * C:
        c, t = claim // blocks, claim % blocks * rows
        count, first = min(rows, T - t), CHUNK // 16 * c
        last = min(first + CHUNK // 16, num_panels)
        parts = Claim(0, count, first, last, first if t + rows < T else last)
        for is_base in range(2 if a.base_x else 1):
            x, head, out = (a.base_x, a.base_weight, base) if is_base else (a.x, a.weight, memory)
            layer = Head(x + row * t, head, K, out - 64 * first, 0, ROW // WORDS, 0)
            MULTIPLY(FORMAT, FEW, layer, sizes, parts)
        for r in range(count):
            score_chunk(a, t + r, c, C, memory + ROW * r, base + ROW * r)
        claim = fetch_add(counter, 1) % DONE
    fetch_add(counter, DONE)
    wait_until(counter, DONE * num_threads)
    for t in range(thread, T, num_threads):
        finish_row(a, t, C)


@inlined
def chunks_of(a):
    return (a.vocab_size + CHUNK - 1) // CHUNK


@inlined
def rows_of_claim(T, C, num_threads, has_base):
    """Rows of a claim: whole tiles, few enough for every thread to have claims to balance."""
    wanted = T * C // (CLAIMS * num_threads) // MAX_ROWS * MAX_ROWS
    return max(MAX_ROWS, min(wanted, MOST_ROWS // 2 if has_base else MOST_ROWS))


@inlined
def row_scratch(a, t):
    """Address of what is kept of a row's chunks."""
    return a.scratch + WORDS * a.scratch_width * t


@inlined
def score_chunk(a, t, c, C, logits, base):
    """What is kept of a chunk of row t: logits and base logits lie at addresses, with room for whole lanes."""
    count, scratch = min(CHUNK, a.vocab_size - CHUNK * c), row_scratch(a, t)
    kept, at_target = scratch + WORDS * CHUNK_WORDS * c, scratch + WORDS * CHUNK_WORDS * C
    place = int64(peek(a.target + WORDS * t, int32)) - CHUNK * c
    if 0 <= place < count:
        poke(at_target, peek(logits + WORDS * place, float32))
        if a.base_x:
            poke(at_target + WORDS, peek(base + WORDS * place, float32))
    fill_lanes(logits, count)
    largest = keep_peak(logits, count, kept + WORDS * HIGHEST)
    if a.base_x:
        fill_lanes(base, count)
        compare_sums(logits, base, count, largest, keep_peak(base, count, kept + WORDS * BASE_HIGHEST), kept)
    else:
        total = lanes(ZERO)
        for i in range(0, count, 16):
            total = total + weight(load(logits + WORDS * i), largest)
        poke(kept + WORDS * SUM, sum_lanes(total))


@inlined
def fill_lanes(logits, count):
    """Gives the lanes past the end the lowest logit: they weigh nothing, and have no difference to a base's."""
    for i in range(count, (count + 15) // 16 * 16):
        poke(logits + WORDS * i, LOWEST)


@inlined
def keep_peak(logits, count, kept):
    """Writes the largest of a chunk's logits, and the first place that has it. Returns it as sums go by it."""
    best, here = lanes(-INFINITY), to_f32(lane_numbers())
    place = here
    for i in range(0, count, 16):
        x = load(logits + WORDS * i)
        place = where_below(best, x, here, place)
        best = maximum(x, best)
        here = here + SIXTEEN
    highest = max_lanes(best)
    first = -max_lanes(-where_below(best, highest, FAR, place))
    poke(kept, highest)
    poke(kept + WORDS, where_below(first, np.float32(count), first, ZERO))
    return maximum(highest, LOWEST) + ZERO


@inlined
def compare_sums(logits, base, count, largest, base_largest, kept):
    """Writes a chunk's sums of exp of logits and of base logits, and of the latter times the difference."""
    total, base_total, cross = lanes(ZERO), lanes(ZERO), lanes(ZERO)
    for i in range(0, count, 16):
        x, y = load(logits + WORDS * i), load(base + WORDS * i)
        base_weight = weight(y, base_largest)
        total, base_total = total + weight(x, largest), base_total + base_weight
        cross = fma(base_weight, y - x, cross)
    poke(kept + WORDS * SUM, sum_lanes(total))
    poke(kept + WORDS * BASE_SUM, sum_lanes(base_total))
    poke(kept + WORDS * CROSS, sum_lanes(cross))


# ---------------------------------------------------------------- rows


@inlined
def finish_row(a, t, C):
    """Writes the scores of a row."""
    scratch, out, target = row_scratch(a, t), a.out + WORDS * NUM_SCORES * t, int64(peek(a.target + WORDS * t, int32))
    at_target = scratch + WORDS * CHUNK_WORDS * C
    trial = joined(scratch, C)
    trial_nll = score_of(trial, target, a.vocab_size, at_target)
    for i in range(NUM_SCORES):
        poke(out + WORDS * i, ZERO)
    poke(out + WORDS * NLL, trial_nll)
    poke(out + WORDS * TOP, trial.token if trial.sound else UNKNOWN)
    poke(out + WORDS * TOP_LOGPROB, ZERO - trial.log_total if trial.sound else UNKNOWN)
    if a.base_x:
        base = joined(scratch + WORDS * BASE_HIGHEST, C)
        base_nll = score_of(base, target, a.vocab_size, at_target + WORDS)
        both = trial.sound and base.sound
        kl = divergence(
            mean_difference(scratch, C, base.largest), trial.largest, trial.log_total, base.largest, base.log_total
        )
        poke(out + WORDS * BASE_NLL, base_nll)
        poke(out + WORDS * KL, kl if both else UNKNOWN)
        poke(out + WORDS * DELTA_P, difference(trial_nll, base_nll, target) if both else UNKNOWN)
        poke(out + WORDS * SAME_TOP, (ONE if trial.token == base.token else ZERO) if both else UNKNOWN)
        poke(out + WORDS * BASE_TOP, base.token if base.sound else UNKNOWN)


@inlined
def score_of(row, target, V, at_target):
    """-log p(target), whose logit lies at an address."""
    logit = peek(at_target, float32) if 0 <= target < V else ZERO
    return nll_of(logit, target, V, row.sound, row.largest, row.log_total)


@inlined
def joined(kept, C):
    """The `Logits` of all chunks; kept: where the highest logit of the first is."""
    highest, token, total, sound = -INFINITY, ZERO, ZERO, True
    for c in range(C):
        found = peek(kept + WORDS * CHUNK_WORDS * c, float32)
        if found > highest:
            highest, token = found, np.float32(CHUNK * c) + peek(kept + WORDS * (CHUNK_WORDS * c + FIRST), float32)
    largest = maximum(highest, LOWEST) + ZERO
    for c in range(C):
        part = peek(kept + WORDS * (CHUNK_WORDS * c + SUM), float32)
        sound = sound and part == part
        total = fma(part, chunk_scale(kept, c, largest), total)
    return Logits(largest, log(total), token, sound)


@inlined
def chunk_scale(kept, c, largest):
    """What the sums of a chunk are multiplied by."""
    top = maximum(peek(kept + WORDS * CHUNK_WORDS * c, float32), LOWEST) + ZERO
    return exp(top - largest)


@inlined
def mean_difference(scratch, C, base_largest):
    """The sum of p0 * (l0 - l), by the sums of the chunks."""
    total, cross = ZERO, ZERO
    for c in range(C):
        scale, place = chunk_scale(scratch + WORDS * BASE_HIGHEST, c, base_largest), scratch + WORDS * CHUNK_WORDS * c
        total = fma(peek(place + WORDS * BASE_SUM, float32), scale, total)
        cross = fma(peek(place + WORDS * CROSS, float32), scale, cross)
    return cross / total


CPU = {}
for _name, _format in FORMATS.items():
    _multiply = multiplied_flushing if _name == "bf16" and not NATIVE_BF16 else multiplied
    globals()[f"score_{_name}"] = variant(_score, f"score_{_name}", MULTIPLY=_multiply, **constants(_name))
    CPU[f"score_{_name}"] = Implementation(globals()[f"score_{_name}"], _format.layout)
