"""Scores of rows by their logits: the fast kernel. It takes the time of the linear layers that make the logits.

Threads claim (4096 tokens of the vocabulary, a few rows); claims of the same tokens follow one another, so that their
weights are read from memory once. A claim's logits are made by the tiles of `linear_cpu` and stay in the cache:

    logits of a claim | of each row: grid, maximum and first token that has it | sums of exp and of exp * difference
    wait for all | of each row: the chunks' sums in ascending order, and the scores
"""

from typing import NamedTuple

import numpy as np

from lockstep.formats import FORMATS
from lockstep.formats.parts.rows import NATIVE_BF16, f32_bytes
from lockstep.native.kernel import inlined, separate, variant
from lockstep.native.machine import FLUSH, IEEE, fetch_add, kept_apart, set_float_control, stack_memory, wait_until
from lockstep.native.numbers import float32, int32, int64
from lockstep.native.simd import (
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
from lockstep.ops.integer.code_linear_cpu import sweep
from lockstep.ops.integer.code_rows import TAIL_PLANES, code_bytes, plane_bytes
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.integer.code_weights import PANELS
from lockstep.ops.linear.linear_cpu import (
    COLS,
    LAYOUTS,
    MAX_ROWS,
    MIN_ROWS,
    Claim,
    Sizes,
    constants,
    merged,
    multiply_claim,
    multiply_rows,
    rows_at_once,
    whole_rows,
)
from lockstep.ops.linear.tile import panel_bytes
from lockstep.ops.math import exp, log
from lockstep.ops.rounded.grids import KIND, ROW_ASYMMETRIC, ROW_SYMMETRIC
from lockstep.ops.rounded.grids_cpu import quantize_row
from lockstep.ops.sampling.sample import CHUNK, INFINITY, LOWEST, UNKNOWN
from lockstep.ops.sampling.sample_cpu import weight
from lockstep.ops.sampling.score import (
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
    implementations,
    nll_of,
)
from lockstep.runtime.operands import WeightArrays
from lockstep.runtime.step import COUNTER, num_rows

WORD = 4  # bytes
ROW = WORD * (CHUNK + 16)  # from one row of a claim's logits to the next: a line more, so that cache sets differ
MOST_ROWS = 48  # of a claim; with a base half as many, since each has two rows of logits
FEWEST_ROWS = 2 * MAX_ROWS  # fewer would be too little arithmetic for the bytes of a chunk of weights
MEMORY_BYTES = MOST_ROWS * ROW
CLAIMS = 8  # of a thread, at least, where there are enough rows
DONE = 1 << 32  # what a thread without work adds to the counter, which counts claims below
SIXTEEN, FAR = np.float32(16), np.float32(CHUNK)
# words of a chunk in a row's scratch
HIGHEST, FIRST, SUM, BASE_HIGHEST, BASE_FIRST, BASE_SUM, CROSS = range(CHUNK_WORDS)
FEW_ROWS = 2  # rows that go through one panel at a time, as in `linear_cpu`, but for all formats
SHAPES = (FEW_ROWS, MIN_ROWS, MAX_ROWS, COLS)  # of tiles, see `linear_cpu.shapes_of`
FORMAT = ROW_BYTES = None  # constants of a variant, see `linear_cpu`
MULTIPLY = None  # constant of a variant: the function that makes the logits of a claim


class Head(NamedTuple):
    """The operands that `multiply_claim` reads, of some rows and a chunk of a head; out: where panel 0 would be."""

    x: int
    weight: WeightArrays
    in_features: int
    out_features: int
    out: int
    residual: int
    width: int
    column: int


class Part(NamedTuple):
    """A claim: a chunk of the vocabulary, its panels first .. last - 1, and num_rows rows from row t on."""

    chunk: int
    first: int
    last: int
    t: int
    num_rows: int


class Logits(NamedTuple):
    """Largest logit of a row (at least LOWEST), the logarithm of its sum, the token, and whether it has a softmax."""

    largest: float
    log_total: float
    token: float
    sound: bool


@merged
def multiplied(format, head, row, part):
    """Writes the logits of a claim."""
    claim = Claim(0, part.num_rows, part.first, part.last, part.first)
    sizes = Sizes(row, panel_bytes(format, head.in_features, head.weight.d), rows_at_once(row))
    multiply_claim(format, SHAPES, multiply_rows, whole_rows, head, sizes, claim)


@separate
def multiplied_pairs(head, row, part):
    """`multiplied` of bf16, in FLUSH mode, by pairs."""
    kept_apart()
    multiplied("bf16", head, row, part)


@separate
def multiplied_flushing(format, head, row, part):
    """`multiplied` in FLUSH mode; scores are computed in IEEE mode again."""
    kept_apart()
    set_float_control(FLUSH)
    multiplied_pairs(head, row, part)
    set_float_control(IEEE)


@merged
def multiplied_codes(format, head, row, part):
    """Writes the logits of a claim by a head of codes."""
    if peek(head.x + 2 * plane_bytes(head.in_features) + TAIL_PLANES, int32) == 1:
        sweep(1, "float", head, 0, part.num_rows, part.first, part.last)
    else:
        sweep(2, "float", head, 0, part.num_rows, part.first, part.last)


def _score(op, step, thread, num_threads):
    """The passes above; claims and the barrier use the op's own counter."""
    a, T = Score.read(op), num_rows(op, step)
    K, C, counter, memory = a.in_features, chunks_of(a), peek(op + 8 * COUNTER, int64), stack_memory(MEMORY_BYTES)
    rows, base = rows_of_claim(T, C, num_threads, a.base_x != 0), memory + MEMORY_BYTES // 2
    claims = (T + rows - 1) // rows * C
    claim = fetch_add(counter, 1) % DONE
    while claim < claims:
        part = part_of(a, claim, claims // C, rows, T)
        for is_base in range(2 if a.base_x else 1):
            if is_base and a.base_f32:
                head = head_of(a, a.base_x + f32_bytes(K) * part.t, a.base_weight, base, part)
                multiplied("f32", head, f32_bytes(K), part)
            else:
                x, weights, out = (a.base_x, a.base_weight, base) if is_base else (a.x, a.weight, memory)
                head = head_of(a, x + ROW_BYTES(K) * part.t, weights, out, part)
                MULTIPLY(FORMAT, head, ROW_BYTES(K), part)
        for r in range(part.num_rows):
            score_chunk(a, part.t + r, part.chunk, C, memory + ROW * r, base + ROW * r)
        claim = fetch_add(counter, 1) % DONE
    fetch_add(counter, DONE)
    wait_until(counter, DONE * num_threads)
    for t in range(thread, T, num_threads):
        finish_row(a, t, C)


@inlined
def part_of(a, claim, num_blocks, rows, T):
    """The `Part` of a claim: claims of the same chunk follow one another."""
    chunk, t = claim // num_blocks, claim % num_blocks * rows
    first = CHUNK // 16 * chunk
    return Part(chunk, first, min(first + CHUNK // 16, (a.vocab_size + 15) // 16), t, min(rows, T - t))


@inlined
def head_of(a, x, weights, out, part):
    """The `Head` that writes a claim's logits at an address."""
    return Head(x, weights, a.in_features, a.vocab_size, out - 64 * part.first, 0, ROW // WORD, 0)


@inlined
def chunks_of(a):
    return (a.vocab_size + CHUNK - 1) // CHUNK


@inlined
def rows_of_claim(T, C, num_threads, has_base):
    """Rows of a claim: whole tiles, few enough for all threads to end together, enough to be worth the weights."""
    even = T * C // (CLAIMS * num_threads) // MAX_ROWS * MAX_ROWS
    return max(FEWEST_ROWS, min(even, MOST_ROWS // 2 if has_base else MOST_ROWS))


@inlined
def row_scratch(a, t):
    """The address of a row's scratch."""
    return a.scratch + WORD * a.scratch_width * t


@inlined
def score_chunk(a, t, c, C, logits, base):
    """Writes the words of chunk c of row t. logits, base: addresses of its logits, with room for whole vectors."""
    num_logits, scratch = min(CHUNK, a.vocab_size - CHUNK * c), row_scratch(a, t)
    kept, at_target = scratch + WORD * CHUNK_WORDS * c, scratch + WORD * CHUNK_WORDS * C
    place = int64(peek(a.target + WORD * t, int32)) - CHUNK * c
    if a.grid:
        round_part(logits, num_logits, a.grid)
    if 0 <= place < num_logits:
        poke(at_target, peek(logits + WORD * place, float32))
        if a.base_x:
            poke(at_target + WORD, peek(base + WORD * place, float32))
    fill_lanes(logits, num_logits)
    largest = keep_peak(logits, num_logits, kept + WORD * HIGHEST)
    if a.base_x:
        fill_lanes(base, num_logits)
        compare_sums(logits, base, num_logits, largest, keep_peak(base, num_logits, kept + WORD * BASE_HIGHEST), kept)
    else:
        total = lanes(ZERO)
        for i in range(0, num_logits, 16):
            total = total + weight(load(logits + WORD * i), largest)
        poke(kept + WORD * SUM, sum_lanes(total))


@inlined
def round_part(logits, num_logits, grid):
    """Rounds a chunk of a row's logits as `score.round_logits` does the row: blocks do not cross chunks."""
    kind = int64(peek(grid + WORD * KIND, float32))
    if kind == ROW_SYMMETRIC or kind == ROW_ASYMMETRIC:
        for i in range(num_logits):
            poke(logits + WORD * i, UNKNOWN)
    else:
        quantize_row(logits, num_logits, grid)


@inlined
def fill_lanes(logits, num_logits):
    """Sets the lanes past the end to the lowest logit: they weigh nothing, and do not differ from a base's."""
    for i in range(num_logits, (num_logits + 15) // 16 * 16):
        poke(logits + WORD * i, LOWEST)


@inlined
def keep_peak(logits, num_logits, kept):
    """Writes the largest of a chunk's logits, and the first place that has it. Returns the largest, as sums use it."""
    best, here = lanes(-INFINITY), to_f32(lane_numbers())
    place = here
    for i in range(0, num_logits, 16):
        x = load(logits + WORD * i)
        place = where_below(best, x, here, place)
        best = maximum(x, best)
        here = here + SIXTEEN
    highest = max_lanes(best)
    first = -max_lanes(-where_below(best, highest, FAR, place))
    poke(kept, highest)
    poke(kept + WORD, where_below(first, np.float32(num_logits), first, ZERO))
    return maximum(highest, LOWEST) + ZERO


@inlined
def compare_sums(logits, base, num_logits, largest, base_largest, kept):
    """Writes a chunk's sums of exp of logits and of base logits, and of the latter times the difference."""
    total, base_total, cross = lanes(ZERO), lanes(ZERO), lanes(ZERO)
    for i in range(0, num_logits, 16):
        x, y = load(logits + WORD * i), load(base + WORD * i)
        base_weight = weight(y, base_largest)
        total, base_total = total + weight(x, largest), base_total + base_weight
        cross = fma(base_weight, y - x, cross)
    poke(kept + WORD * SUM, sum_lanes(total))
    poke(kept + WORD * BASE_SUM, sum_lanes(base_total))
    poke(kept + WORD * CROSS, sum_lanes(cross))


# ---------------------------------------------------------------- rows


@inlined
def finish_row(a, t, C):
    """Writes the scores of a row."""
    scratch, out, target = row_scratch(a, t), a.out + WORD * NUM_SCORES * t, int64(peek(a.target + WORD * t, int32))
    at_target = scratch + WORD * CHUNK_WORDS * C
    trial = joined(scratch, C)
    trial_nll = score_of(trial, target, a.vocab_size, at_target)
    for i in range(NUM_SCORES):
        poke(out + WORD * i, ZERO)
    poke(out + WORD * NLL, trial_nll)
    poke(out + WORD * TOP, trial.token if trial.sound else UNKNOWN)
    poke(out + WORD * TOP_LOGPROB, ZERO - trial.log_total if trial.sound else UNKNOWN)
    if a.base_x:
        base = joined(scratch + WORD * BASE_HIGHEST, C)
        base_nll = score_of(base, target, a.vocab_size, at_target + WORD)
        both = trial.sound and base.sound
        kl = divergence(
            mean_difference(scratch, C, base.largest), trial.largest, trial.log_total, base.largest, base.log_total
        )
        poke(out + WORD * BASE_NLL, base_nll)
        poke(out + WORD * KL, kl if both else UNKNOWN)
        poke(out + WORD * DELTA_P, difference(trial_nll, base_nll, target) if both else UNKNOWN)
        poke(out + WORD * SAME_TOP, (ONE if trial.token == base.token else ZERO) if both else UNKNOWN)
        poke(out + WORD * BASE_TOP, base.token if base.sound else UNKNOWN)


@inlined
def score_of(row, target, V, at_target):
    """-log p(target), whose logit lies at an address."""
    logit = peek(at_target, float32) if 0 <= target < V else ZERO
    return nll_of(logit, target, V, row.sound, row.largest, row.log_total)


@inlined
def joined(kept, C):
    """The `Logits` of all chunks; kept: the address of the first chunk's highest logit."""
    highest, token, total, sound = -INFINITY, ZERO, ZERO, True
    for c in range(C):
        top = peek(kept + WORD * CHUNK_WORDS * c, float32)
        if top > highest:
            highest, token = top, np.float32(CHUNK * c) + peek(kept + WORD * (CHUNK_WORDS * c + FIRST), float32)
    largest = maximum(highest, LOWEST) + ZERO
    for c in range(C):
        part = peek(kept + WORD * (CHUNK_WORDS * c + SUM), float32)
        sound = sound and part == part
        total = fma(part, chunk_scale(kept, c, largest), total)
    return Logits(largest, log(total), token, sound)


@inlined
def chunk_scale(kept, c, largest):
    """The factor of a chunk's sums: exp(its largest logit - the row's)."""
    top = maximum(peek(kept + WORD * CHUNK_WORDS * c, float32), LOWEST) + ZERO
    return exp(top - largest)


@inlined
def mean_difference(scratch, C, base_largest):
    """The sum of p0 * (l0 - l), by the sums of the chunks."""
    total, cross = ZERO, ZERO
    for c in range(C):
        scale, place = chunk_scale(scratch + WORD * BASE_HIGHEST, c, base_largest), scratch + WORD * CHUNK_WORDS * c
        total = fma(peek(place + WORD * BASE_SUM, float32), scale, total)
        cross = fma(peek(place + WORD * CROSS, float32), scale, cross)
    return cross / total


_KERNELS = {}
for _name in (*FORMATS, CODES):
    _constants = dict(FORMAT=_name, MULTIPLY=multiplied, ROW_BYTES=code_bytes)
    if _name in FORMATS:
        _constants |= {name: value for name, value in constants(FORMATS[_name]).items() if name != "SHAPES"}
    if _name == CODES:
        _constants["MULTIPLY"] = multiplied_codes
    elif FORMATS[_name].flushes and not NATIVE_BF16:
        _constants["MULTIPLY"] = multiplied_flushing
    _KERNELS[_name] = globals()[f"score_{_name}"] = variant(_score, f"score_{_name}", **_constants)
CPU = implementations(_KERNELS, {**LAYOUTS, CODES: PANELS})
