"""Pages of the 8-bit cache: scores and values of a block of keys for a tile of query rows. A row of scratch holds

    q   codes as the target multiplies them, then scale (float32) and start (int32) of a score's sum
    o   sums of values; while the queries are loaded, the numbers of a query
    p   exact dots (int32), then scores (float32), then codes of weights (int16) and their scale (float32)
    own [2, 64] scales of a block's keys and values

A row of a page is four dimensions of 64 keys, or all dimensions of four values. Slots that a row does not see have
weight 0: whatever codes they hold, they add nothing to an integer sum, and what their scales make is not taken.
"""

from lockstep.native.kernel import inlined
from lockstep.native.machine import prefetch
from lockstep.native.numbers import float32, int32
from lockstep.native.simd import (
    lanes,
    load,
    load_bf16,
    load_i32,
    max_lanes,
    maximum,
    peek,
    poke,
    rint,
    store,
    store_i8,
    sum_lanes,
    to_f32,
    to_i32,
    where_below,
)
from lockstep.native.targets import unsigned_weights
from lockstep.native.tiles import tile_store
from lockstep.native.tiles_bytes import (
    OFFSET,
    store_words,
    tile_add_bytes,
    tile_add_scaled,
    tile_add_words,
    tile_int_spread,
    tile_int_zeros,
)
from lockstep.ops.attention.attention_q8 import MOST, ONE_MOST
from lockstep.ops.attention.formulas import BLOCK, MAX_HEAD_DIM, ZERO, exp2
from lockstep.ops.attention.kv_cache_q8 import head_place, scale_place
from lockstep.ops.attention.pages import COLS, FEW_COLS, FEW_ROWS, HEIGHT, K_ROW_BYTES, Pair, page_of
from lockstep.ops.attention.softmax import OWN, P_BYTES, ROW_BYTES, Layout, O, P, Q
from lockstep.ops.elementwise.activations import HIGHEST, ONE_127TH, SMALLEST, magnitude
from lockstep.ops.elementwise.activations_cpu import finite

BYTES = unsigned_weights()  # whether the target multiplies bytes
Q_BYTES = 4 if BYTES else 8  # of four codes of a query
Q_SCALE, Q_START = 2 * MAX_HEAD_DIM, 2 * MAX_HEAD_DIM + 4  # into a row of q
W_SCALE = 2 * BLOCK  # into a row of p, after the codes
K_SCALES, V_SCALES = OWN, OWN + 4 * BLOCK
SCRATCH_BYTES = OWN + 8 * BLOCK


@inlined
def keep_query(how, row, d, x, memory):
    store(memory + O + ROW_BYTES * row + 4 * d, x)


@inlined
def end_query(c, row, memory):
    """Quantizes a query that lies in its row of o."""
    q, scaled = memory + Q + ROW_BYTES * row, memory + O + ROW_BYTES * row
    top, sums = lanes(ZERO), to_i32(lanes(ZERO))
    for i in range(0, 4 * c.head_dim, 64):
        top = maximum(magnitude(load(scaled + i)), top)
    amax = max_lanes(top)
    scale, inverse = amax * ONE_127TH, HIGHEST / amax
    if amax < SMALLEST:
        scale, inverse = ZERO, ZERO
    for d in range(0, c.head_dim, 16):
        codes = to_i32(rint(finite(load(scaled + 4 * d)) * inverse))
        sums = sums + codes
        if BYTES:
            store_i8(q + d, codes)
        else:
            store_words(q + 2 * d, codes)
    poke(q + Q_SCALE, scale)
    poke(q + Q_START, int32(OFFSET * sum_lanes(sums) if BYTES else 0))


@inlined
def head_bytes(c, head):
    """Where a head of a page begins."""
    return head_place(head.place, head.g, c.num_kv_heads, c.head_dim)


@inlined
def widen_scales(c, here, ahead, memory):
    """Widens the scales of a block's keys and values; asks for those that come next."""
    at = scale_place(0, c.head_dim)
    for j in range(0, BLOCK, 16):
        store(memory + K_SCALES + 4 * j, load_bf16(c.k + here + at + 2 * j))
        store(memory + V_SCALES + 4 * j, load_bf16(c.v + here + at + 2 * j))
    for line in range(0, 2 * BLOCK, 64):
        prefetch(c.k + ahead + at + line)
        prefetch(c.v + ahead + at + line)


@inlined
def scores(c, how, tile, block, head, next_head, memory):
    """Dots of the block's rows with the slots that any of them sees: HEIGHT rows at a time, then two by two.

    A row without a partner is its own. Few rows ask for the lines of V, each pair for its share.
    """
    (start, first, last), here = block, head_bytes(c, head)
    widen_scales(c, here, head_bytes(c, next_head), memory)
    k, asked, queries = c.k + here, c.v + here, memory + Q + ROW_BYTES * head.base
    steps, share = c.head_dim // 4, lines_a_step(first, last)
    high = first + (last - first) // HEIGHT * HEIGHT if last - first > FEW_ROWS else first
    for row in range(first, high, HEIGHT):
        q = queries + ROW_BYTES * row
        for j in range(0, min(BLOCK, tile.position + (row + HEIGHT - 1) // c.unit_heads + 1 - start), 16 * COLS):
            acc = tile_int_spread(HEIGHT, COLS, q + Q_START, ROW_BYTES)
            for i in range(steps):
                acc = tile_add_bytes(acc, q + Q_BYTES * i, ROW_BYTES, k + K_ROW_BYTES * i + 4 * j, 64)
            tile_store(acc, memory + P + P_BYTES * row + 4 * j, P_BYTES, COLS)
    for row in range(high, last, 2):
        pair, q = 1 if row + 1 < last else 0, queries + ROW_BYTES * row
        for j in range(0, min(BLOCK, tile.position + (row + pair) // c.unit_heads + 1 - start), 16 * FEW_COLS):
            two = tile_int_spread(2, FEW_COLS, q + Q_START, ROW_BYTES * pair)
            for i in range(steps):
                two = tile_add_bytes(two, q + Q_BYTES * i, ROW_BYTES * pair, k + K_ROW_BYTES * i + 4 * j, 64)
                asked = ask(asked, share)
            tile_store(two, memory + P + P_BYTES * row + 4 * j, P_BYTES * pair, FEW_COLS)


@inlined
def ask(place, share):
    """Asks for 1, 2 or 4 lines, as they are shared; returns where the next ones are."""
    for line in range(FEW_COLS):
        prefetch(place + 64 * (line & share - 1))
    return place + 64 * share


@inlined
def lines_a_step(first, last):
    """How many of the lines that come next few rows ask for at each step, so that all pairs of rows ask for as many."""
    pairs = (last - first + 1) // 2
    return (FEW_COLS + pairs - 1) // pairs if last - first <= FEW_ROWS else 1


@inlined
def scaled(c, p, row, memory):
    """Dots become scores."""
    q_scale = peek(memory + Q + ROW_BYTES * row + Q_SCALE, float32)
    for i in range(0, P_BYTES, 64):
        store(p + i, to_f32(load_i32(p + i)) * (load(memory + K_SCALES + i) * q_scale))


@inlined
def weigh(how, p, higher, total, memory):
    """Scores become weights, and those times the scales of values become codes; returns `total` with the weights."""
    most = lanes(ZERO)
    for i in range(0, P_BYTES, 64):
        x = exp2(load(p + i) - higher)
        total = total + x
        x = where_below(ZERO, x, x * load(memory + V_SCALES + i), ZERO)
        store(p + i, x)
        most = maximum(x, most)
    quantize_weights(p, max_lanes(most))
    return total


@inlined
def quantize_weights(p, most):
    """A row of 64 weights at p, the largest of them `most`, becomes words and their scale, in place."""
    scale, inverse = most * ONE_MOST, MOST / most
    if most < SMALLEST:
        scale, inverse = ZERO, ZERO
    for j in range(0, BLOCK, 16):
        store_words(p + 2 * j, to_i32(rint(load(p + 4 * j) * inverse)))
    poke(p + W_SCALE, scale)


@inlined
def values(c, how, tile, block, head, next_head, memory):
    """o += w . v of the block's rows: HEIGHT rows at a time, others two by two. Few rows ask for the next keys."""
    _, first, last = block
    v, sums = c.v + head_bytes(c, head), memory + O + ROW_BYTES * head.base
    share, asked = lines_a_step(first, last), c.k + head_bytes(c, next_head)
    high = first + (last - first) // HEIGHT * HEIGHT if last - first > FEW_ROWS else first
    wide = c.head_dim // (16 * COLS) * (16 * COLS)
    for d in range(0, wide, 16 * COLS):
        for row in range(first, high, HEIGHT):
            weights, o = memory + P + P_BYTES * row, sums + ROW_BYTES * row + 4 * d
            acc = tile_int_zeros(HEIGHT, COLS)
            for i in range(BLOCK // 4):
                acc = tile_add_words(acc, weights + 8 * i, P_BYTES, v + 4 * (c.head_dim * i + d), 64)
            tile_add_scaled(acc, weights + W_SCALE, P_BYTES, o, ROW_BYTES)
    row = first
    while row < last:
        pair, done = 1 if row + 1 < last and row + 1 != high else 0, wide if row < high else 0
        if done < c.head_dim:
            two_rows(c, Pair(row, pair, done, sums + ROW_BYTES * row), v, asked, share, memory)
            asked += c.head_dim // (16 * FEW_COLS) * BLOCK // 4 * 64 * share
        row += 1 + pair


@inlined
def two_rows(c, rows, v, asked, share, memory):
    """o += w . v of a Pair of rows; at each step asks for `share` lines from `asked` on."""
    pair, done, o, weights = rows.next, rows.done, rows.o, memory + P + P_BYTES * rows.row
    wide = done + (c.head_dim - done) // (16 * FEW_COLS) * (16 * FEW_COLS)
    for d in range(done, wide, 16 * FEW_COLS):
        two = tile_int_zeros(2, FEW_COLS)
        for i in range(BLOCK // 4):
            two = tile_add_words(two, weights + 8 * i, P_BYTES * pair, v + 4 * (c.head_dim * i + d), 64)
            asked = ask(asked, share)
        tile_add_scaled(two, weights + W_SCALE, P_BYTES * pair, o + 4 * d, ROW_BYTES * pair)
    for d in range(wide, c.head_dim, 16):
        one = tile_int_zeros(2, 1)
        for i in range(BLOCK // 4):
            one = tile_add_words(one, weights + 8 * i, P_BYTES * pair, v + 4 * (c.head_dim * i + d), 64)
        tile_add_scaled(one, weights + W_SCALE, P_BYTES * pair, o + 4 * d, ROW_BYTES * pair)


QUANTIZED = Layout(keep_query, end_query, page_of, scores, scaled, weigh, values, 0)
