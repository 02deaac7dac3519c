"""The work of a paged attention: which thread takes which rows and keys, and how the parts come together again.

Many rows are bound by arithmetic, few rows by the read of K and V (2 * kv heads * head_dim numbers a token of context).
What each thread works on follows from the sequences' lengths while it runs: nothing is prepared on the host. The work
is cut into tiles of up to 96 rows, which threads claim one by one, so that long and short sequences balance: the few
tokens of a sequence with all heads (if `together`), or some tokens of many with one kv head. Where tiles are few, each
is cut again into spans of 1024 keys, whose results are merged in ascending order, whoever computed them: the thread
that has one waits for its turn.
"""

from collections import namedtuple

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

TILES_PER_THREAD = 4  # with fewer, tiles are cut into spans
STATE_ROW_BYTES = ROW_BYTES + 64  # of a tile's state: the sums of values, then the largest score and the sum of weights
STATE_BYTES = ROWS * STATE_ROW_BYTES
MERGED = 1 << 32  # the counter's upper half counts the spans merged so far, the lower half the claims

# What is attended, the same for every kind of pages. Addresses; x_token and x_head lead from one token or head of an
# array x to the next, table_row from one sequence's page ids to the next, in bytes. num_tokens: rows of out, of which
# those of no sequence become 0. unit_heads: query heads that share one read of a kv head. scale, cap: as `score_scales`
# gives them; q_bf16: the type of q and out. sinks, gate: 0 if there are none. states: memory for the sums of tiles
# between their spans, or 0: they are kept in out, which is float32, and in stats [tokens, num_heads, 2], as the
# maximum and the sum of each softmax. k, v, pages: what a Layout knows.
Call = namedtuple(
    "Call",
    "num_seqs query_start kv_lens table table_row num_tokens q q_token q_head out out_token out_head q_bf16 num_heads "
    "num_kv_heads unit_heads head_dim window scale cap sinks v_scale gate gate_token gate_head stats states k v pages",
)
# How a tile is made. together: the few tokens of a sequence with all their heads; rows: of a tile at most
Cut = namedtuple("Cut", "together rows")


@inlined
def query_start(c, s):
    return entry(c.query_start, s)


@inlined
def tile_shape(c, tokens, cut):
    """(units, tokens) of the tiles of a sequence with so many tokens: of equal size, as far as that goes."""
    units, most = c.num_heads // c.unit_heads, max(1, cut.rows // c.unit_heads)
    if cut.together and tokens * c.num_heads <= cut.rows:
        return units, tokens
    count = (tokens + most - 1) // most
    return 1, (tokens + count - 1) // count


@inlined
def count_work(c, cut):
    """(tiles, items): an item is a span of a tile; and the number of spans of the longest sequence."""
    tiles, items, spans = int64(0), int64(0), int64(0)
    for s in range(c.num_seqs):
        tokens, length = query_start(c, s + 1) - query_start(c, s), entry(c.kv_lens, s)
        if tokens > 0:
            units, rows = tile_shape(c, tokens, cut)
            count = c.num_heads // c.unit_heads // units * ((tokens + rows - 1) // rows)
            own = (length - 1) // SPAN + 1
            tiles, items, spans = tiles + count, items + count * own, max(spans, own)
    return tiles, items, spans


@merged
def attend_claimed(c, layout, together, alone, counter, thread, num_threads, memory):
    """One thread: it walks the same list of items as every other and works on those that it has claimed.

    An item is a tile or, where tiles are cut, one span of a tile, spans outermost, so that neighbours in the list can
    run together. Later tokens, which see more keys, come first. alone: a tile is one token and one unit, and is never
    cut.
    """
    clear_padding(c, thread, num_threads)
    # one token is never a literal 1: where a stride folds to 0, Numba's nested optimisation may take the other half of
    # an address for an offset from null, and drop the access (LLVM 22)
    tall, enough = min(num_threads, 1) if alone else ROWS, TILES_PER_THREAD * num_threads
    cut = Cut(together, tall)
    tiles, items, spans = count_work(c, cut)
    if together and num_threads > 1 and items < enough:
        cut = Cut(False, tall)
        tiles, items, spans = count_work(c, cut)
    in_spans = not alone and num_threads > 1 and tiles < enough
    index, claimed = int64(0), fetch_add(counter, 1) & (MERGED - 1)
    for turn in range(spans if in_spans else min(spans, 1)):
        passed = int64(0)
        for s in range(c.num_seqs):
            start, tokens = query_start(c, s), query_start(c, s + 1) - query_start(c, s)
            if tokens == 0:
                continue
            units, rows = tile_shape(c, tokens, cut)
            across = c.num_heads // c.unit_heads // units
            count = across * ((tokens + rows - 1) // rows)
            for i in range(count):
                if not in_spans and index != claimed:
                    index += 1
                    continue
                begin = ((count - 1 - i) // across) * rows
                position, table = entry(c.kv_lens, s) - tokens + begin, c.table + c.table_row * s
                tile = Tile(start + begin, min(rows, tokens - begin), position, i % across * units, units, table)
                first, last = first_key(position, c.window) // SPAN, (position + tile.tokens - 1) // SPAN
                if in_spans and not first <= turn <= last:
                    continue
                if index == claimed:
                    load_queries(c, layout, tile, memory)
                    state = c.states + STATE_BYTES * (passed + i if in_spans else thread) if c.states != 0 else 0
                    end = turn if in_spans else last
                    for span in range(turn if in_spans else first, end + 1):
                        attend_span(c, layout, tile, span, end, memory)
                        if in_spans:  # all items before this one were claimed earlier: someone is working on them
                            wait_until(counter, index * MERGED)
                        end_span(c, tile, span, state, memory)
                    if in_spans:
                        fetch_add(counter, MERGED)
                    claimed = fetch_add(counter, 1) & (MERGED - 1)
                index += 1
            passed += count


@inlined
def load_queries(c, layout, tile, memory):
    """The tile's queries, scaled, one row after the other."""
    row = int64(0)
    for u in range(tile.units):
        for t in range(tile.tokens):
            for h in range(c.unit_heads):
                source = c.q + c.q_token * (tile.token + t) + c.q_head * ((tile.unit + u) * c.unit_heads + h)
                for d in range(0, c.head_dim, 16):
                    x = load_bf16(source + 2 * d) if c.q_bf16 else load(source + 4 * d)
                    layout.keep_query(layout.how, row, d, cleared(x * c.scale), memory)
                layout.end_query(c, row, memory)
                row += 1


@inlined
def end_span(c, tile, span, state, memory):
    """Merges a finished span into the rows that see it, and finishes the rows whose last one it is."""
    row = int64(0)
    for u in range(tile.units):
        for t in range(tile.tokens):
            first, last = first_key(tile.position + t, c.window) // SPAN, (tile.position + t) // SPAN
            for h in range(c.unit_heads):
                if first <= span <= last:
                    token, head = tile.token + t, (tile.unit + u) * c.unit_heads + h
                    out = c.out + c.out_token * token + c.out_head * head
                    kept = state + STATE_ROW_BYTES * row if c.states != 0 else out
                    stats = kept + ROW_BYTES if c.states != 0 else c.stats + 8 * (c.num_heads * token + head)
                    o, top = memory + O + ROW_BYTES * row, peek(memory + TOP + 4 * row, float32)
                    total = sum_lanes(load(memory + LANE + LANE_BYTES * row))
                    if span > first:
                        top, total = merge(c, kept, stats, top, total, o)
                    poke(stats, top)
                    poke(stats + 4, total)
                    if span == last:
                        finish(c, token, head, out, top, total, o)
                    else:
                        for i in range(0, 4 * c.head_dim, 64):
                            store(kept + i, load(o + i))
                row += 1


@inlined
def merge(c, kept, stats, top, total, o):
    """What earlier spans left joins the row at o; returns its maximum and sum."""
    before = peek(stats, float32)
    higher = maximum(top, before)
    old, new = exp2(before - higher), exp2(top - higher)
    for i in range(0, 4 * c.head_dim, 64):
        store(o + i, cleared(fma(load(kept + i), old, cleared(load(o + i) * new))))
    return higher, fma(peek(stats + 4, float32), old, total * new)


@inlined
def finish(c, token, head, out, top, total, o):
    """The row's output: see `attention.finished`."""
    share = kept_share(top, total, peek(c.sinks + 4 * head, float32)) if c.sinks != 0 else total
    gate = c.gate + c.gate_token * token + c.gate_head * head
    for d in range(0, c.head_dim, 16):
        value = cleared(load(o + 4 * d) / total)
        if c.sinks != 0:
            value = cleared(value * share)
        value = cleared(value * c.v_scale)
        if c.gate != 0:
            value = cleared(value * sigmoid(load(gate + 4 * d)))
        store_output(c, out, d, value)


@inlined
def store_output(c, out, d, value):
    """Sixteen numbers of an output row, in its type."""
    if c.q_bf16:
        store_bf16(out + 2 * d, round_bf16(value))
    else:
        store(out + 4 * d, value)


@inlined
def clear_padding(c, thread, num_threads):
    """Zeros to the rows of no sequence, dealt in turn."""
    for t in range(query_start(c, c.num_seqs) + thread, c.num_tokens, num_threads):
        for h in range(c.num_heads):
            for d in range(0, c.head_dim, 16):
                store_output(c, c.out + c.out_token * t + c.out_head * h, d, lanes(ZERO))
