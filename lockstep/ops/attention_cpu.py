"""Causal attention over a paged cache: the fast kernel.

Many rows are bound by arithmetic, few rows by the read of K and V (2 * kv heads * K numbers a token of context). The
work is cut into tiles (up to 96 query rows that share a kv head) which threads claim one by one, so that long and short
requests balance. With few tiles each is cut again into spans of 1024 keys; a span's result is merged into the tile's
row of `out` and `stats` in ascending order, whoever computed it: the thread that has one waits for its turn.
"""

from numba import float32, int64

from lockstep.ops import attention_q8_block as q8
from lockstep.ops.attention import Attention
from lockstep.ops.attention_block import (
    LANE,
    LANE_BYTES,
    PAIRS,
    ROW_BYTES,
    ROWS,
    SCRATCH_BYTES,
    SINGLE,
    TOP,
    O,
    Tile,
    attend_span,
    load_queries,
)
from lockstep.ops.attention_math import SPAN, cleared, exp2, first_key
from lockstep.ops.math import sigmoid
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, variant
from lockstep.runtime.machine import fetch_add, stack_memory, wait_until
from lockstep.runtime.simd import fma, load, maximum, peek, poke, store, sum_lanes
from lockstep.runtime.step import COUNTER, StepBlock, entry, pages_of

TILES_PER_THREAD = 4  # with fewer, tiles are cut into spans
# Constants of each variant. LOAD, ATTEND, HOW: take the queries of a tile, and a span of its keys, from a cache of one
# type, and what both are told. ALONE: a tile is one token and one head; nothing is shared.
LOAD, ATTEND, HOW, ALONE = load_queries, attend_span, SINGLE, False
MERGED = 1 << 32  # the counter's upper half counts the spans merged so far, the lower half the claims


@inlined
def make_tile(a, batch, group, request, first, tokens, unit):
    """The tile of `tokens` tokens of a request from its token `first` of this step; unit: which group of heads."""
    start, stop = entry(batch.query_start, request), entry(batch.query_start, request + 1)
    position = entry(batch.context_len, request) - (stop - start) + first
    table = pages_of(batch, request, a.page_group)
    head = unit * group
    return Tile(start + first, tokens, position, head, group, head // (a.num_heads // a.num_kv_heads), table)


@inlined
def count_tiles(batch, tokens_per_tile, units):
    """Tiles of the step, and spans of its longest request."""
    tiles, longest = int64(0), int64(0)
    for s in range(batch.num_requests):
        tokens = entry(batch.query_start, s + 1) - entry(batch.query_start, s)
        tiles += (tokens + tokens_per_tile - 1) // tokens_per_tile * units
        longest = max(longest, entry(batch.context_len, s))
    return tiles, (longest + SPAN - 1) // SPAN


def attend_claimed(op, step, thread, num_threads):
    """One thread of an attention op: every thread walks the same list of items and works on those it has claimed.

    An item is a tile or, where tiles are few and threads many, one span of a tile, spans outermost, so that neighbours
    in the list can run together. Later tokens, which see more keys, come first.
    """
    a, batch = Attention.read(op), StepBlock.read(step)
    counter, memory = peek(op + 8 * COUNTER, int64), stack_memory(SCRATCH_BYTES)
    # one token and one head are never a literal 1: where a stride folds to 0, Numba's nested optimisation may take the
    # other half of an address for an offset from null, and drop the access (LLVM 22)
    rows = min(num_threads, 1) if ALONE else ROWS
    group = rows if ALONE else a.num_heads // a.num_kv_heads
    tokens_per_tile, units = max(1, rows // group), a.num_heads // group
    tiles, spans = count_tiles(batch, tokens_per_tile, units)
    cut = not ALONE and num_threads > 1 and tiles < TILES_PER_THREAD * num_threads
    index, claimed = int64(0), fetch_add(counter, 1) & (MERGED - 1)
    for turn in range(spans if cut else 1):
        for s in range(batch.num_requests):
            tokens = entry(batch.query_start, s + 1) - entry(batch.query_start, s)
            for i in range((tokens - 1) // tokens_per_tile, -1, -1):
                for unit in range(units):
                    start = i * tokens_per_tile
                    tile = make_tile(a, batch, group, s, start, min(tokens_per_tile, tokens - start), unit)
                    first = first_key(tile.position, a.window) // SPAN
                    last = (tile.position + tile.tokens - 1) // SPAN
                    if cut and not first <= turn <= last:
                        continue
                    if index == claimed:
                        LOAD(a, tile, HOW, memory)
                        for span in range(turn if cut else first, (turn if cut else last) + 1):
                            ATTEND(a, tile, span, HOW, memory)
                            if cut:  # all items before this one were claimed earlier, so someone is working on them
                                wait_until(counter, index * MERGED)
                            end_span(a, tile, span, memory)
                        fetch_add(counter, MERGED)
                        claimed = fetch_add(counter, 1) & (MERGED - 1)
                    index += 1


@inlined
def end_span(a, tile, span, memory):
    """Merges a finished span into the rows that see it, and finishes the rows whose last one it is."""
    for row in range(tile.tokens * tile.group):
        position, head = tile.position + row // tile.group, tile.head + row % tile.group
        token = tile.token + row // tile.group
        place = a.num_heads * token + head
        out, stats = a.out + 4 * a.head_dim * place, a.stats + 8 * place
        first = first_key(position, a.window) // SPAN
        if first <= span <= position // SPAN:
            merge_row(a, out, stats, span == first, row, memory)
            if span == position // SPAN:
                total = peek(stats + 4, float32)
                gate = a.gate + 4 * (a.gate_width * token + a.gate_offset + a.gate_stride * head)
                for i in range(0, 4 * a.head_dim, 64):
                    value = cleared(load(out + i) / total)
                    store(out + i, cleared(value * sigmoid(load(gate + i))) if a.gate != 0 else value)


@inlined
def merge_row(a, out, stats, is_first, row, memory):
    """One row of a span joins what earlier spans left in out and stats."""
    o, top = memory + O + ROW_BYTES * row, peek(memory + TOP + 4 * row, float32)
    total = sum_lanes(load(memory + LANE + LANE_BYTES * row))
    if is_first:
        for i in range(0, 4 * a.head_dim, 64):
            store(out + i, load(o + i))
    else:
        before = peek(stats, float32)
        higher = maximum(top, before)
        old, new = exp2(before - higher), exp2(top - higher)
        top, total = higher, fma(peek(stats + 4, float32), old, total * new)
        for i in range(0, 4 * a.head_dim, 64):
            store(out + i, cleared(fma(load(out + i), old, cleared(load(o + i) * new))))
    poke(stats, top)
    poke(stats + 4, total)


CPU, PER_TOKEN = {}, {}
for kind, load_tile, attend_tile, how in (
    ("attention", load_queries, attend_span, SINGLE),
    ("attention_bf16", load_queries, attend_span, PAIRS),
    ("attention_q8", q8.load_queries, q8.attend_span, None),
):
    for name, alone, implementations in ((kind, False, CPU), (f"{kind}_per_token", True, PER_TOKEN)):
        made = variant(attend_claimed, name, LOAD=load_tile, ATTEND=attend_tile, HOW=how, ALONE=alone)
        globals()[name] = made
        # pairs are flushed step by step; where that takes a mode it is the whole op's, which `cleared` makes invisible
        implementations[kind] = Implementation(made, flushes=how is PAIRS)
