"""Linear layers: the fast kernels. Rows by panels of sixteen features, a register tile through all of K.

A few rows are bound by the stream of weights; many by arithmetic. Threads claim runs of panels, so that uneven cores
balance; a run's weights are read from memory once and serve all rows, up to MAX_ROWS of them at a time from registers.

    panel (16 features)   [k block][16 features]...   one contiguous stream, see weights/pack.py
    tile, few rows        all rows x 1 panel of accumulators: panel follows panel, one stream of memory
    tile, many rows       MAX_ROWS x COLS panels: fewest loads for each dot, see runtime/tiles_linear.py
"""

from numba import int64, njit

from lockstep.ops.activations import NATIVE_BF16
from lockstep.ops.activations import row_bytes as q8_row_bytes
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import STRICT, inlined, kernel
from lockstep.runtime.machine import fetch_add
from lockstep.runtime.simd import peek
from lockstep.runtime.step import COUNTER, num_rows, word
from lockstep.runtime.targets import wide_registers
from lockstep.runtime.tiles_dots import Q4_1_BYTES, Q5_0_BYTES, Q5_1_BYTES
from lockstep.runtime.tiles_k import Q4_K_BYTES, Q5_K_BYTES, Q6_K_BYTES
from lockstep.runtime.tiles_linear import (
    BF16_TILE,
    F16_TILE,
    F32_TILE,
    Q4_0_TILE,
    Q4_1_TILE,
    Q4_K_TILE,
    Q5_0_TILE,
    Q5_1_TILE,
    Q5_K_TILE,
    Q6_K_TILE,
    Q8_0_TILE,
    linear_tile,
)
from lockstep.weights.pack import pack_bf16, pack_f16, pack_f32, pack_q4_0, pack_q8_0
from lockstep.weights.pack_k import pack_q4_k, pack_q5_k, pack_q6_k
from lockstep.weights.pack_q5 import pack_q4_1, pack_q5_0, pack_q5_1

COLS = 2 if wide_registers() else 1  # panels of a tile: 6 x 2 x 16 lanes fill 32 registers, 6 x 1 x 16 fill 16
MIN_ROWS, MAX_ROWS = 3, 6
FEW_ROWS = 8 if COLS == 2 else MAX_ROWS  # they share each panel while it streams by, one panel at a time
ALL_PANELS = (1 << COLS) - 1  # a bit each
NEAR_BYTES = 34 * 1024  # weights of a tile that stay in the first-level cache, beside six rows of activations
K_UNIT = 256  # the largest block of a format
CACHE_BYTES = 192 * 1024  # activations that stay in the second-level cache while panels pass by
CLAIMS_FEW_ROWS, CLAIMS_MANY_ROWS = 8, 16  # of a thread: long streams for memory, even ends for arithmetic
MAX_CLAIM = 64  # panels
BF16_BYTES = 2 if NATIVE_BF16 else 4


def merged(function):
    """Decorator: a helper that is part of its caller before types are inferred, so that LLVM sees its code once."""
    return njit(inline="always", **STRICT)(function)


@merged
def together(
    format,
    x,
    row,
    w,
    panel,
    scales,
    panel_scales,
    K,
    residual,
    out,
    out_row,
    panels,
    resume,
    next_codes,
    next_scales,
    left,
):
    """COLS panels by `left` rows, as one tile or in tiles of nearly equal height. Arguments as of `linear_tile`.

    The first tile brings what comes next near; where there are several, the first two bring half of it each.
    """
    if left <= FEW_ROWS:
        linear_tile(
            format,
            (1, FEW_ROWS),
            COLS,
            1,
            left,
            x,
            row,
            w,
            panel,
            scales,
            panel_scales,
            K,
            residual,
            out,
            out_row,
            panels,
            resume,
            next_codes,
            next_scales,
            ALL_PANELS,
        )
        return
    wanted, later = ALL_PANELS // 2, ALL_PANELS - ALL_PANELS // 2
    while left > 0:
        tiles = (left + MAX_ROWS - 1) // MAX_ROWS
        rows = (left + tiles - 1) // tiles
        linear_tile(
            format,
            (MIN_ROWS, MAX_ROWS),
            COLS,
            COLS,
            rows,
            x,
            row,
            w,
            panel,
            scales,
            panel_scales,
            K,
            residual,
            out,
            out_row,
            panels,
            resume,
            next_codes,
            next_scales,
            wanted,
        )
        left, x, out = left - rows, x + rows * row, out + rows * out_row
        residual = residual + rows * out_row if residual else 0
        wanted, later = later, 0


@merged
def alone(
    format,
    x,
    row,
    w,
    panel,
    scales,
    panel_scales,
    K,
    residual,
    out,
    out_row,
    panels,
    resume,
    next_codes,
    next_scales,
    left,
):
    """COLS panels by one row: `together` for left = 1."""
    linear_tile(
        format,
        (1, 1),
        COLS,
        1,
        1,
        x,
        row,
        w,
        panel,
        scales,
        panel_scales,
        K,
        residual,
        out,
        out_row,
        panels,
        resume,
        next_codes,
        next_scales,
        0,
    )


@inlined
def claim_size(num_panels, num_threads, rows):
    """Panels that a thread claims at a time: enough claims to balance, few enough to stream."""
    size = num_panels // ((CLAIMS_FEW_ROWS if rows <= 2 * MAX_ROWS else CLAIMS_MANY_ROWS) * num_threads)
    return max(2, min(MAX_CLAIM, size - size % 2))


@inlined
def part_of_k(K, panel, rows):
    """How much of K is worked on at a time, so that the panels of a tile stay in the nearest cache for all rows."""
    part = NEAR_BYTES * K // (COLS * panel) // K_UNIT * K_UNIT
    return K if rows <= FEW_ROWS else min(K, max(K_UNIT, part))


@merged
def drive(op, step, num_threads, format, sweep, unit, params, w, panel, scales, row):
    """The thread's share of a linear layer: operands 0 to 2 of the op are out, x and the residual.

    Claims are runs of panels by `unit` rows. params: index of the first parameter. They are K; the width of a row of
    out; has_residual; the columns of out that are written: the first one and how many, multiples of 16. w, scales: the
    packed weights; panel, row: bytes of a panel and of a row of x. A claim is taken while the one before is worked on,
    so that its first panels can be brought near.
    """
    K, out_row, has_residual = word(op, params), 4 * word(op, params + 1), word(op, params + 2)
    T, first_byte, num_panels = num_rows(op, step), 4 * word(op, params + 3), word(op, params + 4) // 16
    at_once, part = max(MAX_ROWS, CACHE_BYTES // row // MAX_ROWS * MAX_ROWS), part_of_k(K, panel, min(T, unit))
    size = claim_size(num_panels, num_threads, min(T, unit))
    num_claims, counter = (num_panels + size - 1) // size, peek(op + 8 * COUNTER, int64)
    claim, next_claim = fetch_add(counter, 1), fetch_add(counter, 1)
    while claim * unit < num_claims * T:
        start, first = claim // num_claims * unit, claim % num_claims * size
        end, last = min(start + unit, T), min(first + size, num_panels)
        for t in range(start, end, at_once):
            after = first if t + at_once < end else next_claim % num_claims * size
            for p in range(first, last, COLS):
                place, next_p = out_row * t + first_byte + 64 * p, p + COLS if p + COLS < last else after
                for k in range(0, K, part):
                    next_k, q = (k + part, p) if k + part < K else (0, next_p)
                    residual = word(op, 2) + place if has_residual and next_k == 0 else 0
                    sweep(
                        format,
                        word(op, 1) + row * t + row * k // K,
                        row,
                        w + panel * p + panel * k // K,
                        panel,
                        scales + K * p + k,
                        K,
                        min(part, K - k),
                        residual,
                        word(op, 0) + place,
                        out_row,
                        num_panels - p,
                        k,
                        w + panel * q + panel * next_k // K,
                        scales + K * q + next_k,
                        min(at_once, end - t),
                    )
        claim, next_claim = next_claim, fetch_add(counter, 1)


@merged
def f32(op, step, num_threads, sweep, unit):
    drive(op, step, num_threads, F32_TILE, sweep, unit, 4, word(op, 3), 64 * word(op, 4), 0, 4 * word(op, 4))


@merged
def f16(op, step, num_threads, sweep, unit):
    drive(op, step, num_threads, F16_TILE, sweep, unit, 4, word(op, 3), 32 * word(op, 4), 0, 4 * word(op, 4))


@merged
def bf16(op, step, num_threads, sweep, unit):
    drive(op, step, num_threads, BF16_TILE, sweep, unit, 4, word(op, 3), 32 * word(op, 4), 0, BF16_BYTES * word(op, 4))


@merged
def q8_0(op, step, num_threads, sweep, unit):
    panel, row = 16 * word(op, 5), q8_row_bytes(word(op, 5))
    drive(op, step, num_threads, Q8_0_TILE, sweep, unit, 5, word(op, 3), panel, word(op, 4), row)


@merged
def q4_0(op, step, num_threads, sweep, unit):
    panel, row = 8 * word(op, 5), q8_row_bytes(word(op, 5))
    drive(op, step, num_threads, Q4_0_TILE, sweep, unit, 5, word(op, 3), panel, word(op, 4), row)


@merged
def q4_1(op, step, num_threads, sweep, unit):
    panel, row = word(op, 4) // 32 * Q4_1_BYTES, q8_row_bytes(word(op, 4))
    drive(op, step, num_threads, Q4_1_TILE, sweep, unit, 4, word(op, 3), panel, 0, row)


@merged
def q5_0(op, step, num_threads, sweep, unit):
    panel, row = word(op, 5) // 32 * Q5_0_BYTES, q8_row_bytes(word(op, 5))
    drive(op, step, num_threads, Q5_0_TILE, sweep, unit, 5, word(op, 3), panel, word(op, 4), row)


@merged
def q5_1(op, step, num_threads, sweep, unit):
    panel, row = word(op, 4) // 32 * Q5_1_BYTES, q8_row_bytes(word(op, 4))
    drive(op, step, num_threads, Q5_1_TILE, sweep, unit, 4, word(op, 3), panel, 0, row)


@merged
def q4_k(op, step, num_threads, sweep, unit):
    panel, row = word(op, 4) // 256 * Q4_K_BYTES, q8_row_bytes(word(op, 4))
    drive(op, step, num_threads, Q4_K_TILE, sweep, unit, 4, word(op, 3), panel, 0, row)


@merged
def q5_k(op, step, num_threads, sweep, unit):
    panel, row = word(op, 4) // 256 * Q5_K_BYTES, q8_row_bytes(word(op, 4))
    drive(op, step, num_threads, Q5_K_TILE, sweep, unit, 4, word(op, 3), panel, 0, row)


@merged
def q6_k(op, step, num_threads, sweep, unit):
    panel, row = word(op, 4) // 256 * Q6_K_BYTES, q8_row_bytes(word(op, 4))
    drive(op, step, num_threads, Q6_K_TILE, sweep, unit, 4, word(op, 3), panel, 0, row)


@kernel
def linear_f32(op, step, thread, num_threads):
    f32(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_f16(op, step, thread, num_threads):
    f16(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_bf16(op, step, thread, num_threads):
    bf16(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_q8_0(op, step, thread, num_threads):
    q8_0(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_q4_0(op, step, thread, num_threads):
    q4_0(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_q4_1(op, step, thread, num_threads):
    q4_1(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_q5_0(op, step, thread, num_threads):
    q5_0(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_q5_1(op, step, thread, num_threads):
    q5_1(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_q4_k(op, step, thread, num_threads):
    q4_k(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_q5_k(op, step, thread, num_threads):
    q5_k(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_q6_k(op, step, thread, num_threads):
    q6_k(op, step, num_threads, together, num_rows(op, step))


@kernel
def linear_f32_per_token(op, step, thread, num_threads):
    f32(op, step, num_threads, alone, 1)


@kernel
def linear_f16_per_token(op, step, thread, num_threads):
    f16(op, step, num_threads, alone, 1)


@kernel
def linear_bf16_per_token(op, step, thread, num_threads):
    bf16(op, step, num_threads, alone, 1)


@kernel
def linear_q8_0_per_token(op, step, thread, num_threads):
    q8_0(op, step, num_threads, alone, 1)


@kernel
def linear_q4_0_per_token(op, step, thread, num_threads):
    q4_0(op, step, num_threads, alone, 1)


@kernel
def linear_q4_1_per_token(op, step, thread, num_threads):
    q4_1(op, step, num_threads, alone, 1)


@kernel
def linear_q5_0_per_token(op, step, thread, num_threads):
    q5_0(op, step, num_threads, alone, 1)


@kernel
def linear_q5_1_per_token(op, step, thread, num_threads):
    q5_1(op, step, num_threads, alone, 1)


@kernel
def linear_q4_k_per_token(op, step, thread, num_threads):
    q4_k(op, step, num_threads, alone, 1)


@kernel
def linear_q5_k_per_token(op, step, thread, num_threads):
    q5_k(op, step, num_threads, alone, 1)


@kernel
def linear_q6_k_per_token(op, step, thread, num_threads):
    q6_k(op, step, num_threads, alone, 1)


CPU = {
    "linear_f32": Implementation(linear_f32, ("f32 panels", pack_f32)),
    "linear_f16": Implementation(linear_f16, ("f16 panels", pack_f16)),
    "linear_bf16": Implementation(linear_bf16, ("bf16 panels", pack_bf16), flushes=True),
    "linear_q8_0": Implementation(linear_q8_0, ("q8_0 panels", pack_q8_0)),
    "linear_q4_0": Implementation(linear_q4_0, ("q4_0 panels", pack_q4_0)),
    "linear_q4_1": Implementation(linear_q4_1, ("q4_1 panels", pack_q4_1)),
    "linear_q5_0": Implementation(linear_q5_0, ("q5_0 panels", pack_q5_0)),
    "linear_q5_1": Implementation(linear_q5_1, ("q5_1 panels", pack_q5_1)),
    "linear_q4_k": Implementation(linear_q4_k, ("q4_k panels", pack_q4_k)),
    "linear_q5_k": Implementation(linear_q5_k, ("q5_k panels", pack_q5_k)),
    "linear_q6_k": Implementation(linear_q6_k, ("q6_k panels", pack_q6_k)),
}

# one row at a time: every row reads all weights anew, with the same one-row tile
PER_TOKEN = {
    "linear_f32": Implementation(linear_f32_per_token, ("f32 panels", pack_f32)),
    "linear_f16": Implementation(linear_f16_per_token, ("f16 panels", pack_f16)),
    "linear_bf16": Implementation(linear_bf16_per_token, ("bf16 panels", pack_bf16), flushes=True),
    "linear_q8_0": Implementation(linear_q8_0_per_token, ("q8_0 panels", pack_q8_0)),
    "linear_q4_0": Implementation(linear_q4_0_per_token, ("q4_0 panels", pack_q4_0)),
    "linear_q4_1": Implementation(linear_q4_1_per_token, ("q4_1 panels", pack_q4_1)),
    "linear_q5_0": Implementation(linear_q5_0_per_token, ("q5_0 panels", pack_q5_0)),
    "linear_q5_1": Implementation(linear_q5_1_per_token, ("q5_1 panels", pack_q5_1)),
    "linear_q4_k": Implementation(linear_q4_k_per_token, ("q4_k panels", pack_q4_k)),
    "linear_q5_k": Implementation(linear_q5_k_per_token, ("q5_k panels", pack_q5_k)),
    "linear_q6_k": Implementation(linear_q6_k_per_token, ("q6_k panels", pack_q6_k)),
}
