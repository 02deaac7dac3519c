"""The work of a paged attention: which thread takes which rows and keys, and how results of spans are merged.

Many rows are bound by arithmetic, few rows by the read of K and V (2 * kv heads * head_dim numbers a token of context).
Threads find their work from the sequences' lengths while they run: nothing is prepared on the host. The work is cut
into tiles of up to 96 rows, which threads claim one by one, so that long and short sequences balance: a tile has some
tokens of a sequence with one kv head or, if `all_heads`, all tokens of a short sequence with all heads. Where there are
few tiles, each is cut again into spans of 1024 keys, whose results are merged in ascending order, whoever computed
them: the thread that has computed a span waits for its turn. Where there are still fewer than threads, query heads that
share a kv head are parted (`heads_together`), and tiles have fewer rows.
"""

from typing import NamedTuple

from lockstep.native.kernel import inlined, merged
from lockstep.native.machine import fetch_add, wait_until
from lockstep.native.numbers import float32, int64
from lockstep.native.simd import (
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
from lockstep.ops.attention.formulas import SPAN, ZERO, cleared, exp2, first_key, kept_share
from lockstep.ops.attention.softmax import LANE, LANE_BYTES, ROW_BYTES, ROWS, TOP, O, Tile, attend_span
from lockstep.ops.math import sigmoid
from lockstep.runtime.step import entry

TILES_PER_THREAD = 4  # where there are fewer, tiles are cut into spans
FEWEST_ROWS = ROWS // 4  # of a tile that is made smaller so that there are more
STATE_ROW_BYTES = ROW_BYTES + 64  # of a tile's state: the sums of values, then the largest score and the sum of weights
STATE_BYTES = ROWS * STATE_ROW_BYTES
MERGED = 1 << 32  # the counter's upper half counts the spans merged so far, the lower half the claims


class Call(NamedTuple):
    """One attention over pages of any layout: addresses of arrays, strides in bytes, sizes and numbers.

    x_token and x_head lead from one token or head of an array x to the next, table_row from one sequence's page ids to
    the next. Rows of out that belong to no sequence become 0.
    """

    num_seqs: int
    query_start: int
    kv_lens: int
    table: int
    table_row: int
    num_tokens: int  # rows of out
    q: int
    q_token: int
    q_head: int
    out: int
    out_token: int
    out_head: int
    q_bf16: bool  # whether q and out are bfloat16
    num_heads: int
    num_kv_heads: int
    unit_heads: int  # query heads that share one read of a kv head
    head_dim: int
    window: int
    scale: float  # scale and cap as `score_scales` gives them
    cap: float
    sinks: int  # 0: none
    v_scale: float
    gate: int  # 0: none
    gate_token: int
    gate_head: int
    stats: int  # the maximum and the sum of each softmax, [tokens, num_heads, 2]
    states: int  # memory for the sums of tiles between their spans; 0: the sums are kept in stats and out, then float32
    k: int
    v: int
    strides: tuple | int  # of pages of any size: `pages_rows.Strides`; else 0


class Cut(NamedTuple):
    """How sequences are cut into tiles. all_heads: a sequence of few tokens is one tile with all its heads; max_rows:
    the most rows of a tile."""

    all_heads: bool
    max_rows: int


@inlined
def query_start(call, s):
    return entry(call.query_start, s)


@inlined
def tile_shape(call, num_tokens, cut):
    """(units, tokens) of the tiles of a sequence of num_tokens tokens: tiles of equal size, but for a smaller last."""
    num_units, max_tokens = call.num_heads // call.unit_heads, max(1, cut.max_rows // call.unit_heads)
    if cut.all_heads and num_tokens * call.num_heads <= cut.max_rows:
        return num_units, num_tokens
    num_tiles = (num_tokens + max_tokens - 1) // max_tokens
    return 1, (num_tokens + num_tiles - 1) // num_tiles


@inlined
def count_work(call, cut):
    """How many tiles there are, how many spans of tiles, and how many spans the longest sequence has."""
    num_tiles, num_tile_spans, max_spans = int64(0), int64(0), int64(0)
    for s in range(call.num_seqs):
        num_tokens, length = query_start(call, s + 1) - query_start(call, s), entry(call.kv_lens, s)
        if num_tokens > 0:
            units, tokens = tile_shape(call, num_tokens, cut)
            count = call.num_heads // call.unit_heads // units * ((num_tokens + tokens - 1) // tokens)
            num_spans = (length - 1) // SPAN + 1
            num_tiles, num_tile_spans = num_tiles + count, num_tile_spans + count * num_spans
            max_spans = max(max_spans, num_spans)
    return num_tiles, num_tile_spans, max_spans


@inlined
def heads_together(call, num_threads):
    """How many of a unit's query heads remain together, so that all threads have a tile: each part reads the keys and
    values anew, of which the shared cache then has a copy."""
    _, num_tile_spans, _ = count_work(call, Cut(False, ROWS))
    heads = call.unit_heads
    while num_tile_spans * (call.unit_heads // heads) < num_threads and heads % 2 == 0:
        heads //= 2
    return heads


@inlined
def smaller(call, cut, num_tiles, num_threads):
    """The Cut with half as many rows a tile, or a quarter, where tiles are too few to end together."""
    rows = cut.max_rows
    while num_tiles < TILES_PER_THREAD // 2 * num_threads and rows > FEWEST_ROWS:
        rows //= 2
        num_tiles, _, _ = count_work(call, Cut(cut.all_heads, rows))
    return Cut(cut.all_heads, rows)


@merged
def attend_claimed(call, layout, all_heads, one_row, counter, thread, num_threads, memory):
    """The work of one thread: all threads walk the same list of items, and each works on the items that it has claimed.

    An item is a tile or, where tiles are cut, one span of a tile, spans outermost, so that neighbours in the list can
    run at the same time. Later tokens, which see more keys, come first. all_heads: see `Cut`; one_row: a tile is one
    token and one unit, and is never cut.
    """
    clear_padding(call, thread, num_threads)
    # one token is never a literal 1: where a stride folds to 0, Numba's nested optimisation may take the other half of
    # an address for an offset from null, and drop the access (LLVM 22)
    max_rows, enough = min(num_threads, 1) if one_row else ROWS, TILES_PER_THREAD * num_threads
    cut = Cut(all_heads, max_rows)
    num_tiles, num_tile_spans, max_spans = count_work(call, cut)
    if all_heads and num_threads > 1 and num_tile_spans < enough:
        cut = Cut(False, max_rows)
        num_tiles, num_tile_spans, max_spans = count_work(call, cut)
    if not one_row and num_threads > 1 and call.states == 0:  # states have room for the largest tiles only
        cut = smaller(call, cut, num_tiles, num_threads)
        num_tiles, num_tile_spans, max_spans = count_work(call, cut)
    in_spans = not one_row and num_threads > 1 and num_tiles < enough
    index, claimed = int64(0), fetch_add(counter, 1) & (MERGED - 1)
    for turn in range(max_spans if in_spans else min(max_spans, 1)):  # the span, if tiles are cut
        tiles_before = int64(0)  # of earlier sequences
        for s in range(call.num_seqs):
            start, num_tokens = query_start(call, s), query_start(call, s + 1) - query_start(call, s)
            if num_tokens == 0:
                continue
            units, tokens = tile_shape(call, num_tokens, cut)
            across = call.num_heads // call.unit_heads // units  # tiles of the same tokens
            count = across * ((num_tokens + tokens - 1) // tokens)
            for i in range(count):
                if not in_spans and index != claimed:
                    index += 1
                    continue
                begin = ((count - 1 - i) // across) * tokens
                position, table = entry(call.kv_lens, s) - num_tokens + begin, call.table + call.table_row * s
                tile = Tile(start + begin, min(tokens, num_tokens - begin), position, i % across * units, units, table)
                first, last = first_key(position, call.window) // SPAN, (position + tile.num_tokens - 1) // SPAN
                if in_spans and not first <= turn <= last:
                    continue
                if index == claimed:
                    load_queries(call, layout, tile, memory)
                    state_index = tiles_before + i if in_spans else thread
                    state = call.states + STATE_BYTES * state_index if call.states != 0 else 0
                    last_span = turn if in_spans else last
                    for span in range(turn if in_spans else first, last_span + 1):
                        attend_span(call, layout, tile, span, last_span, memory)
                        if in_spans:  # all items before this one were claimed earlier: threads are working on them
                            wait_until(counter, index * MERGED)
                        end_span(call, tile, span, state, memory)
                    if in_spans:
                        fetch_add(counter, MERGED)
                    claimed = fetch_add(counter, 1) & (MERGED - 1)
                index += 1
            tiles_before += count


@inlined
def load_queries(call, layout, tile, memory):
    """Stores the tile's queries, scaled, row by row."""
    row = int64(0)
    for u in range(tile.num_units):
        for t in range(tile.num_tokens):
            for h in range(call.unit_heads):
                head = (tile.unit + u) * call.unit_heads + h
                source = call.q + call.q_token * (tile.token + t) + call.q_head * head
                for d in range(0, call.head_dim, 16):
                    x = load_bf16(source + 2 * d) if call.q_bf16 else load(source + 4 * d)
                    layout.store_query(layout.arithmetic, row, d, cleared(x * call.scale), memory)
                layout.finish_query(call, row, memory)
                row += 1


@inlined
def end_span(call, tile, span, state, memory):
    """Merges a finished span into the rows that see any of its keys, and finishes the rows whose last span it is."""
    row = int64(0)
    for u in range(tile.num_units):
        for t in range(tile.num_tokens):
            first, last = first_key(tile.position + t, call.window) // SPAN, (tile.position + t) // SPAN
            for h in range(call.unit_heads):
                if first <= span <= last:
                    token, head = tile.token + t, (tile.unit + u) * call.unit_heads + h
                    out = call.out + call.out_token * token + call.out_head * head
                    sums = state + STATE_ROW_BYTES * row if call.states != 0 else out
                    stats = sums + ROW_BYTES if call.states != 0 else call.stats + 8 * (call.num_heads * token + head)
                    o, top = memory + O + ROW_BYTES * row, peek(memory + TOP + 4 * row, float32)
                    total = sum_lanes(load(memory + LANE + LANE_BYTES * row))
                    if span > first:
                        top, total = merge(call, sums, stats, top, total, o)
                    poke(stats, top)
                    poke(stats + 4, total)
                    if span == last:
                        finish(call, token, head, out, top, total, o)
                    else:
                        for i in range(0, 4 * call.head_dim, 64):
                            store(sums + i, load(o + i))
                row += 1


@inlined
def merge(call, sums, stats, top, total, o):
    """Merges the results of earlier spans into the row at o; returns the new maximum and sum of weights."""
    before = peek(stats, float32)
    higher = maximum(top, before)
    old, new = exp2(before - higher), exp2(top - higher)
    for i in range(0, 4 * call.head_dim, 64):
        store(o + i, cleared(fma(load(sums + i), old, cleared(load(o + i) * new))))
    return higher, fma(peek(stats + 4, float32), old, total * new)


@inlined
def finish(call, token, head, out, top, total, o):
    """Stores a row's output: see `attention.finished`."""
    share = kept_share(top, total, peek(call.sinks + 4 * head, float32)) if call.sinks != 0 else total
    gate = call.gate + call.gate_token * token + call.gate_head * head
    for d in range(0, call.head_dim, 16):
        value = cleared(load(o + 4 * d) / total)
        if call.sinks != 0:
            value = cleared(value * share)
        value = cleared(value * call.v_scale)
        if call.gate != 0:
            value = cleared(value * sigmoid(load(gate + 4 * d)))
        store_output(call, out, d, value)


@inlined
def store_output(call, out, d, value):
    """Stores sixteen numbers of an output row, in the type of out."""
    if call.q_bf16:
        store_bf16(out + 2 * d, round_bf16(value))
    else:
        store(out + 4 * d, value)


@inlined
def clear_padding(call, thread, num_threads):
    """Writes zeros to the rows of out that belong to no sequence; rows are dealt to threads in turn."""
    for t in range(query_start(call, call.num_seqs) + thread, call.num_tokens, num_threads):
        for h in range(call.num_heads):
            for d in range(0, call.head_dim, 16):
                store_output(call, call.out + call.out_token * t + call.out_head * h, d, lanes(ZERO))
