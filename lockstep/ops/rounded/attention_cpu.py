"""Attention with every intermediate on a grid: the fast kernel.

HEIGHT query rows of one kv head at a time: a row of scores for each, of all keys; then row by row the steps of the
definition; then values, all keys for some dimensions at a time, with sums in registers. Rows of scores stay on the
thread's stack, K and V in its second-level cache.
"""

from collections import namedtuple

from lockstep.native.kernel import inlined, variant
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import int64
from lockstep.native.simd import load, store
from lockstep.native.targets import TARGET
from lockstep.native.tiles import tile_fma_f32, tile_load, tile_store, tile_zeros
from lockstep.ops.attention.formulas import cleared
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.ops.math import sigmoid
from lockstep.ops.rounded.attention import MASKED, MAX_KEYS, PV, QK, RAW, P, RoundedAttention, row_keys
from lockstep.ops.rounded.grids import GRID_WORDS
from lockstep.ops.rounded.grids_cpu import quantize_row
from lockstep.ops.rounded.row_math_cpu import add_mask_row, copy_row, scale_row, softmax_row
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, entry, pages_of

HEIGHT, COLS = (6, 2) if TARGET.is_wide else (5, 1)  # HEIGHT x COLS x 16 lanes of accumulators fill the registers
LANES = 16
MAX_HEAD_DIM = 256
Q_BYTES = 4 * MAX_HEAD_DIM
SPARE_BYTES = 64  # after a row of scores, so that rows do not all fall into the same sets of a cache
SCRATCH_BYTES = HEIGHT * (Q_BYTES + 4 * MAX_KEYS + 4 * PAGE_TOKENS + SPARE_BYTES)
ONE_THREAD = None  # constant of a variant: whether one thread does all rows

# keys and values of one kv head of a sequence. k, v: where the head is in page 0; table: address of the sequence's page
# ids; page_bytes, row_bytes: of a page, and of a value
Sequence = namedtuple("Sequence", "k v table page_bytes row_bytes")


@inlined
def sequence_of(pages, table, g, G, K):
    """A Sequence. pages: (k_pages, v_pages). table: the request's pages, see `pages_of`."""
    size = 4 * PAGE_TOKENS * K
    return Sequence(pages[0] + size * g, pages[1] + size * g, table, size * G, 4 * K)


@inlined
def score_rows(q, q_row, num_rows, s, num_keys, out, out_row):
    """q . k of num_rows rows (HEIGHT at most) and the first num_keys keys, rounded up to a multiple of 16.

    q, out: addresses of the first row; q_row, out_row: bytes to the next.
    """
    for start in range(0, num_keys, PAGE_TOKENS):
        k = s.k + s.page_bytes * entry(s.table, start // PAGE_TOKENS)
        stop = min(PAGE_TOKENS, num_keys - start)
        if num_rows == HEIGHT:
            for j in range(0, stop, LANES * COLS):
                acc = tile_zeros(HEIGHT, COLS)
                for i in range(0, s.row_bytes, 4):
                    acc = tile_fma_f32(acc, q + i, q_row, k + PAGE_TOKENS * i + 4 * j, 64)
                tile_store(acc, out + 4 * (start + j), out_row, min(COLS, (stop - j + LANES - 1) // LANES))
        else:
            for row in range(num_rows):
                for j in range(0, stop, LANES):
                    one = tile_zeros(1, 1)
                    for i in range(0, s.row_bytes, 4):
                        one = tile_fma_f32(one, q + q_row * row + i, 0, k + PAGE_TOKENS * i + 4 * j, 64)
                    tile_store(one, out + out_row * row + 4 * (start + j), 0, 1)


@inlined
def value_rows(p, p_row, num_rows, s, num_shared, out, out_row):
    """The sums of p v of num_rows rows (HEIGHT at most) over the first num_shared keys."""
    for d in range(0, s.row_bytes, 64 * COLS):
        wide = min(COLS, (s.row_bytes - d) // 64)
        if num_rows == HEIGHT and wide == COLS:
            acc = tile_zeros(HEIGHT, COLS)
            for start in range(0, num_shared, PAGE_TOKENS):
                v = s.v + s.page_bytes * entry(s.table, start // PAGE_TOKENS) + d
                for j in range(min(PAGE_TOKENS, num_shared - start)):
                    acc = tile_fma_f32(acc, p + 4 * (start + j), p_row, v + s.row_bytes * j, 64)
            tile_store(acc, out + d, out_row, COLS)
        else:
            for row in range(num_rows):
                for e in range(d, d + 64 * wide, 64):
                    one_row(p + p_row * row, s, 0, num_shared, e, out + out_row * row, tile_zeros(1, 1))


@inlined
def one_row(p, s, first, last, d, out, acc):
    """Sixteen dimensions, from byte d on, of one row's sum over the keys first .. last - 1, added to acc."""
    for j in range(first, last):
        v = s.v + s.page_bytes * entry(s.table, j // PAGE_TOKENS) + s.row_bytes * (j % PAGE_TOKENS) + d
        acc = tile_fma_f32(acc, p + 4 * j, 0, v, 64)
    tile_store(acc, out + d, 0, 1)


@inlined
def value_tail(p, s, first, last, out):
    """Continues the sums of one row over the keys first .. last - 1."""
    for d in range(0, s.row_bytes if first < last else 0, 64):
        one_row(p, s, first, last, d, out, tile_load(1, 1, out + d, 0))


@inlined
def round_head(a, x, num_values, site, h):
    """Rounds num_values values at x to the grid of head h at a site."""
    quantize_row(x, num_values, a.grids + 4 * GRID_WORDS * (site * a.num_heads + h))


@inlined
def weigh(a, x, num_keys, position, h):
    """Turns a row of scores into a row of weights."""
    round_head(a, x, num_keys, RAW, h)
    scale_row(x, num_keys, a.scale, x)
    round_head(a, x, num_keys, QK, h)
    if a.additive:
        add_mask_row(x, num_keys, position, a.fill)
        round_head(a, x, num_keys, MASKED, h)
    softmax_row(x, num_keys)
    round_head(a, x, num_keys, P, h)


@inlined
def finish_row(a, t, h):
    """The last grid of a row, and its gate."""
    out = a.out + 4 * a.head_dim * (a.num_heads * t + h)
    round_head(a, out, a.head_dim, PV, h)
    if a.gate != 0:
        gate = a.gate + 4 * (a.gate_width * t + a.gate_offset + a.gate_stride * h)
        for i in range(0, 4 * a.head_dim, 64):
            store(out + i, cleared(load(out + i) * sigmoid(load(gate + i))))


@inlined
def attend_rows(a, batch, request, g, first, num_rows, memory):
    """num_rows rows (HEIGHT at most) of a kv head of a request, from `first` on: token by token, its query heads."""
    H, K, group = a.num_heads, a.head_dim, a.num_heads // a.num_kv_heads
    start, x = entry(batch.query_start, request), memory + HEIGHT * Q_BYTES
    s = sequence_of((a.k_pages, a.v_pages), pages_of(batch, request, a.page_group), g, a.num_kv_heads, K)
    for r in range(num_rows):
        t, h = start + (first + r) // group, g * group + (first + r) % group
        copy_row(a.q + 4 * K * (H * t + h), K, memory + Q_BYTES * r)
    last = row_keys(a, batch, start + (first + num_rows - 1) // group)
    width = 4 * ((last + PAGE_TOKENS - 1) // PAGE_TOKENS * PAGE_TOKENS) + SPARE_BYTES
    score_rows(memory, Q_BYTES, num_rows, s, last, x, width)
    for r in range(num_rows):
        t, h = start + (first + r) // group, g * group + (first + r) % group
        weigh(a, x + width * r, row_keys(a, batch, t), entry(batch.position, t), h)
    num_shared = row_keys(a, batch, start + first // group)
    value_rows(x, width, num_rows, s, num_shared, memory, Q_BYTES)
    for r in range(num_rows):
        t, h = start + (first + r) // group, g * group + (first + r) % group
        value_tail(x + width * r, s, num_shared, row_keys(a, batch, t), memory + Q_BYTES * r)
        copy_row(memory + Q_BYTES * r, K, a.out + 4 * K * (H * t + h))
        finish_row(a, t, h)


def attend(op, step, thread, num_threads):
    """Tiles of rows are dealt to threads in turn, so that short and long rows are shared out evenly."""
    a, batch, memory = RoundedAttention.read(op), StepBlock.read(step), stack_memory(SCRATCH_BYTES)
    group, task, height = a.num_heads // a.num_kv_heads, int64(0), 1 if ONE_THREAD else HEIGHT
    for request in range(batch.num_requests):
        num_rows = group * (entry(batch.query_start, request + 1) - entry(batch.query_start, request))
        num_tiles = (num_rows + height - 1) // height
        for i in strided(num_tiles * a.num_kv_heads, (thread - task) % num_threads, num_threads, ONE_THREAD):
            first = i // a.num_kv_heads * height
            attend_rows(a, batch, request, i % a.num_kv_heads, first, min(height, num_rows - first), memory)
        task += num_tiles * a.num_kv_heads


rounded_attention = variant(attend, "rounded_attention", ONE_THREAD=False)
rounded_attention_per_token = variant(attend, "rounded_attention_per_token", ONE_THREAD=True)

CPU = {"rounded_attention": Implementation(rounded_attention)}
PER_TOKEN = {"rounded_attention": Implementation(rounded_attention_per_token)}
