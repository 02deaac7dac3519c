"""Attention of a ragged batch over pages of any size: the fast kernel.

Many rows are bound by arithmetic, few rows by the read of K and V (2 * kv heads * head_dim numbers a token of context).
What each thread works on follows from cu_q_lens, kv_lens and num_seqs while it runs: nothing is prepared on the host.
The work is cut into tiles of up to 96 rows, which threads claim one by one: the few tokens of a sequence with all
heads, or some tokens of many with one kv head. Where tiles are few, each is cut again into spans of 1024 keys, whose
results are merged in ascending order, whoever computed them: the thread that has one waits for its turn.
"""

import numpy as np
from numba import float32, int32, int64

from lockstep.ops.attention_math import SPAN, ZERO, cleared, exp2, first_key
from lockstep.ops.ragged_attention import RaggedAttention, kept_share
from lockstep.ops.ragged_block import (
    LANE,
    LANE_BYTES,
    ROW_BYTES,
    ROWS,
    SCRATCH_BYTES,
    TOP,
    O,
    Q,
    Tile,
    attend_span,
)
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.machine import fetch_add, stack_memory, wait_until
from lockstep.runtime.simd import (
    fma,
    lanes,
    load,
    load_bf16,
    maximum,
    peek,
    poke,
    round_bf16,
    store,
    store_bf16,
    sum_lanes,
)
from lockstep.runtime.step import COUNTER

TILES_PER_THREAD = 4  # with fewer, tiles are cut into spans
STATE_ROW_BYTES = ROW_BYTES + 64  # of a tile's state: the sums of values, then the largest score and the sum of weights
STATE_BYTES = ROWS * STATE_ROW_BYTES


@inlined
def query_start(a, s):
    return np.int64(peek(a.cu_q_lens + 4 * s, int32))


@inlined
def kv_len(a, s):
    return np.int64(peek(a.kv_lens + 4 * s, int32))


@inlined
def num_seqs(a):
    return np.int64(peek(a.num_seqs, int32))


@inlined
def tile_shape(a, tokens, together):
    """(units, tokens) of the tiles of a sequence with so many tokens: of equal size, as far as that goes."""
    units, most = a.num_heads // a.unit_heads, ROWS // a.unit_heads
    if together and tokens * a.num_heads <= ROWS:
        return units, tokens
    count = (tokens + most - 1) // most
    return 1, (tokens + count - 1) // count


@inlined
def count_work(a, together):
    """(tiles, items): an item is a span of a tile; and the number of spans of the longest sequence."""
    tiles, items, spans = int64(0), int64(0), int64(0)
    for s in range(num_seqs(a)):
        tokens, length = query_start(a, s + 1) - query_start(a, s), kv_len(a, s)
        if tokens > 0:
            units, rows = tile_shape(a, tokens, together)
            count = a.num_heads // a.unit_heads // units * ((tokens + rows - 1) // rows)
            own = (length - 1) // SPAN + 1
            tiles, items, spans = tiles + count, items + count * own, max(spans, own)
    return tiles, items, spans


@inlined
def load_queries(a, tile, memory):
    """The tile's queries, scaled, one row after the other."""
    row = memory + Q
    for u in range(tile.units):
        for t in range(tile.tokens):
            for h in range(a.unit_heads):
                source = a.q + a.q_token * (tile.token + t) + a.q_head * ((tile.unit + u) * a.unit_heads + h)
                for d in range(0, a.head_dim, 16):
                    q = load_bf16(source + 2 * d) if a.q_bf16 else load(source + 4 * d)
                    store(row + 4 * d, cleared(q * a.scale))
                row += ROW_BYTES


@inlined
def end_span(a, tile, span, memory, state):
    """Merges a finished span into the rows that see it, and finishes the rows whose last one it is."""
    row = int64(0)
    for u in range(tile.units):
        for t in range(tile.tokens):
            first = first_key(tile.position + t, a.window) // SPAN
            last = (tile.position + t) // SPAN
            for h in range(a.unit_heads):
                if first <= span <= last:
                    o, kept = memory + O + ROW_BYTES * row, state + STATE_ROW_BYTES * row
                    head = (tile.unit + u) * a.unit_heads + h
                    top = peek(memory + TOP + 4 * row, float32)
                    total = sum_lanes(load(memory + LANE + LANE_BYTES * row))
                    if span > first:
                        top, total = merge(a, kept, top, total, o)
                    if span < last:
                        keep(a, kept, top, total, o)
                    else:
                        out = a.out + a.out_token * (tile.token + t) + a.out_head * head
                        finish(a, out, head, top, total, o)
                row += 1


@inlined
def merge(a, kept, top, total, o):
    """What earlier spans left joins the row at o; returns its maximum and sum."""
    before = peek(kept + ROW_BYTES, float32)
    higher = maximum(top, before)
    old, new = exp2(before - higher), exp2(top - higher)
    for i in range(0, 4 * a.head_dim, 64):
        store(o + i, cleared(fma(load(kept + i), old, cleared(load(o + i) * new))))
    return higher, fma(peek(kept + ROW_BYTES + 4, float32), old, total * new)


@inlined
def keep(a, kept, top, total, o):
    """Leaves a row for the next span."""
    for i in range(0, 4 * a.head_dim, 64):
        store(kept + i, load(o + i))
    poke(kept + ROW_BYTES, top)
    poke(kept + ROW_BYTES + 4, total)


@inlined
def finish(a, out, head, top, total, o):
    """The row's output."""
    share = kept_share(top, total, peek(a.sinks + 4 * head, float32)) if a.sinks != 0 else total
    for d in range(0, a.head_dim, 16):
        value = cleared(load(o + 4 * d) / total)
        if a.sinks != 0:
            value = value * share
        store_output(a, out, d, value * a.v_scale)


@inlined
def store_output(a, out, d, value):
    """Sixteen numbers of an output row, in its type."""
    if a.q_bf16:
        store_bf16(out + 2 * d, round_bf16(value))
    else:
        store(out + 4 * d, value)


@inlined
def clear_padding(a, thread, num_threads):
    """Zeros to the rows of no sequence, dealt in turn."""
    for t in range(query_start(a, num_seqs(a)) + thread, a.num_tokens, num_threads):
        for h in range(a.num_heads):
            out = a.out + a.out_token * t + a.out_head * h
            for d in range(0, a.head_dim, 16):
                store_output(a, out, d, lanes(ZERO))


@kernel
def ragged_attention(op, step, thread, num_threads):
    """One thread: it walks the same list of items as every other and works on those it has claimed. step is not used.

    An item is a tile or, where tiles are cut, one span of a tile, spans outermost, so that neighbours in the list can
    run together. Later tokens, which see more keys, come first.
    """
    a, counter, memory = RaggedAttention.read(op), peek(op + 8 * COUNTER, int64), stack_memory(SCRATCH_BYTES)
    clear_padding(a, thread, num_threads)
    together, enough = True, TILES_PER_THREAD * num_threads
    tiles, items, spans = count_work(a, together)
    if num_threads > 1 and items < enough:
        together = False
        tiles, items, spans = count_work(a, together)
    cut = num_threads > 1 and tiles < enough
    index, claimed = int64(0), fetch_add(counter, 1)
    for turn in range(spans if cut else min(spans, 1)):
        passed = int64(0)
        for s in range(num_seqs(a)):
            start, tokens = query_start(a, s), query_start(a, s + 1) - query_start(a, s)
            if tokens == 0:
                continue
            units, rows = tile_shape(a, tokens, together)
            across = a.num_heads // a.unit_heads // units
            count = across * ((tokens + rows - 1) // rows)
            for i in range(count):
                if not cut and index != claimed:
                    index += 1
                    continue
                begin = ((count - 1 - i) // across) * rows
                position = kv_len(a, s) - tokens + begin
                tile = Tile(
                    start + begin,
                    min(rows, tokens - begin),
                    position,
                    i % across * units,
                    units,
                    a.page_indices + a.table_row * s,
                )
                first, last = first_key(position, a.window) // SPAN, (position + tile.tokens - 1) // SPAN
                if cut and not first <= turn <= last:
                    continue
                if index == claimed:
                    load_queries(a, tile, memory)
                    state = a.states + STATE_BYTES * (passed + i if cut else thread)
                    for span in range(turn if cut else first, (turn if cut else last) + 1):
                        attend_span(a, tile, span, memory)
                        if cut:  # the tile's spans before this one were claimed earlier: someone is working on them
                            wait_until(a.turns + 64 * (passed + i), span - first)
                        end_span(a, tile, span, memory, state)
                        if cut:
                            fetch_add(a.turns + 64 * (passed + i), 1)
                    claimed = fetch_add(counter, 1)
                index += 1
            passed += count
