"""Causal attention over a paged cache: the fast kernel.

Many rows are bound by arithmetic, few rows by the read of K and V (2 * kv heads * K numbers a token of context). The
work is cut into tiles (up to 96 query rows that share a kv head) which threads claim one by one, so that long and short
requests balance. With few tiles each is cut again into spans of 1024 keys; a span's result is merged into the tile's
row of `out` and `stats` in ascending order, whoever computed it: the thread that has one waits for its turn.
"""

from numba import float32, int64

from lockstep.ops.attention_block import (
    LANE,
    LANE_BYTES,
    ROW_BYTES,
    ROWS,
    SCRATCH_BYTES,
    TOP,
    Call,
    O,
    Tile,
    attend_span,
    first_key,
    keep_pairs,
    keep_single,
    load_queries,
    pair_step,
    single_step,
)
from lockstep.ops.attention_math import SPAN, cleared, exp2, score_scales
from lockstep.ops.math import sigmoid
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.machine import fetch_add, load_acquire, pause, stack_memory, yield_core
from lockstep.runtime.simd import fma, load, maximum, peek, poke, store, sum_lanes
from lockstep.runtime.step import (
    CONTEXT_LEN,
    COUNTER,
    NUM_REQUESTS,
    PAGE_TABLE,
    PAGES_PER_REQUEST,
    QUERY_START,
    entry,
    number,
    step_word,
    word,
)

TILES_PER_THREAD = 4  # with fewer, tiles are cut into spans
MERGED = 1 << 32  # the counter's upper half counts the spans merged so far, the lower half the claims


@inlined
def read_call(op, base, has_gate, tokens_at_once):
    """The op's operands; base: index of the first parameter.

    tokens_at_once: query rows of a tile at most; 1: one token and one head. Never a literal 1: where a stride folds to
    0, Numba's nested optimisation may take the other half of an address for an offset from null, and drop the access
    (LLVM 22).
    """
    scale, cap = score_scales(number(op, base + 3), number(op, base + 5))
    gate, gate_bytes, gate_stride = int64(0), int64(0), int64(0)
    if has_gate:
        gate = word(op, 5) + 4 * word(op, base + 8)
        gate_bytes, gate_stride = 4 * word(op, base + 7), 4 * word(op, base + 9)
    group = word(op, base) // word(op, base + 1) if tokens_at_once > 1 else tokens_at_once
    return Call(
        word(op, 0),
        word(op, 1),
        word(op, 2),
        word(op, 3),
        word(op, 4),
        gate,
        gate_bytes,
        gate_stride,
        word(op, base),
        word(op, base + 1),
        word(op, base + 2),
        group,
        word(op, base + 4),
        scale,
        cap,
    )


@inlined
def make_tile(call, step, request, first, tokens, unit):
    """The tile of `tokens` tokens of a request from its token `first` of this step; unit: which group of heads."""
    start, stop = entry(step, QUERY_START, request), entry(step, QUERY_START, request + 1)
    position = entry(step, CONTEXT_LEN, request) - (stop - start) + first
    table = step_word(step, PAGE_TABLE) + 4 * request * step_word(step, PAGES_PER_REQUEST)
    head = unit * call.group
    return Tile(start + first, tokens, position, head, head // (call.heads // call.kv_heads), table)


@inlined
def count_tiles(call, step, tokens_per_tile):
    """Tiles of the step, and spans of its longest request."""
    tiles, longest = int64(0), int64(0)
    for s in range(step_word(step, NUM_REQUESTS)):
        tokens = entry(step, QUERY_START, s + 1) - entry(step, QUERY_START, s)
        tiles += (tokens + tokens_per_tile - 1) // tokens_per_tile * (call.heads // call.group)
        longest = max(longest, entry(step, CONTEXT_LEN, s))
    return tiles, (longest + SPAN - 1) // SPAN


@inlined
def run(op, step, num_threads, base, has_gate, tokens_at_once, cuts, load, attend, how):
    """One thread of an attention op: every thread walks the same list of items and works on those it has claimed.

    An item is a tile or, where tiles are few and may be cut (`cuts`), one span of a tile, spans outermost, so that
    neighbours in the list can run together. Later tokens, which see more keys, come first. load, attend: take the
    queries of a tile, and a span of its keys, from a cache of one type; how: what they are told.
    """
    call, counter = read_call(op, base, has_gate, tokens_at_once), peek(op + 8 * COUNTER, int64)
    memory = stack_memory(SCRATCH_BYTES)
    tokens_per_tile = max(1, tokens_at_once // call.group)
    tiles, spans = count_tiles(call, step, tokens_per_tile)
    cut = cuts and tiles < TILES_PER_THREAD * num_threads
    index, claimed = int64(0), fetch_add(counter, 1) & (MERGED - 1)
    for turn in range(spans if cut else 1):
        for s in range(step_word(step, NUM_REQUESTS)):
            tokens = entry(step, QUERY_START, s + 1) - entry(step, QUERY_START, s)
            for i in range((tokens - 1) // tokens_per_tile, -1, -1):
                for unit in range(call.heads // call.group):
                    start = i * tokens_per_tile
                    tile = make_tile(call, step, s, start, min(tokens_per_tile, tokens - start), unit)
                    first, last = first_key(call, tile.position) // SPAN, (tile.position + tile.tokens - 1) // SPAN
                    if cut and not first <= turn <= last:
                        continue
                    if index == claimed:
                        load(call, tile, how, memory)
                        for span in range(turn if cut else first, (turn if cut else last) + 1):
                            attend(call, tile, span, how, memory)
                            if cut:
                                wait_for_turn(counter, index)
                            end_span(call, tile, span, memory)
                        fetch_add(counter, MERGED)
                        claimed = fetch_add(counter, 1) & (MERGED - 1)
                    index += 1


@inlined
def wait_for_turn(counter, index):
    """Waits until all items before this one are merged: they were claimed earlier, so someone is working on them."""
    spins = 0
    while load_acquire(counter) // MERGED != index:
        pause()
        spins += 1
        if spins > 50:
            yield_core()


@inlined
def end_span(call, tile, span, memory):
    """Merges a finished span into the rows that see it, and finishes the rows whose last one it is."""
    for row in range(tile.tokens * call.group):
        position, head = tile.position + row // call.group, tile.head + row % call.group
        token = tile.token + row // call.group
        place = call.heads * token + head
        out, stats = call.out + 4 * call.head_dim * place, call.stats + 8 * place
        if first_key(call, position) // SPAN <= span <= position // SPAN:
            merge_row(call, out, stats, span == first_key(call, position) // SPAN, row, memory)
            if span == position // SPAN:
                total, gate = peek(stats + 4, float32), call.gate + call.gate_bytes * token + call.gate_stride * head
                for i in range(0, 4 * call.head_dim, 64):
                    value = cleared(load(out + i) / total)
                    store(out + i, cleared(value * sigmoid(load(gate + i))) if call.gate != 0 else value)


@inlined
def merge_row(call, out, stats, is_first, row, memory):
    """One row of a span joins what earlier spans left in out and stats."""
    o, top = memory + O + ROW_BYTES * row, peek(memory + TOP + 4 * row, float32)
    total = sum_lanes(load(memory + LANE + LANE_BYTES * row))
    if is_first:
        for i in range(0, 4 * call.head_dim, 64):
            store(out + i, load(o + i))
    else:
        before = peek(stats, float32)
        higher = maximum(top, before)
        a, b = exp2(before - higher), exp2(top - higher)
        top, total = higher, fma(peek(stats + 4, float32), a, total * b)
        for i in range(0, 4 * call.head_dim, 64):
            store(out + i, cleared(fma(load(out + i), a, cleared(load(o + i) * b))))
    poke(stats, top)
    poke(stats + 4, total)


@inlined
def single(op, step, num_threads, base, has_gate, tokens_at_once, cuts):
    """float32 pages, number by number."""
    run(
        op,
        step,
        num_threads,
        base,
        has_gate,
        tokens_at_once,
        cuts,
        load_queries,
        attend_span,
        (1, single_step, keep_single),
    )


@inlined
def paired(op, step, num_threads, base, has_gate, tokens_at_once, cuts):
    """bfloat16 pages, in pairs."""
    run(
        op,
        step,
        num_threads,
        base,
        has_gate,
        tokens_at_once,
        cuts,
        load_queries,
        attend_span,
        (2, pair_step, keep_pairs),
    )


@kernel
def attention(op, step, thread, num_threads):
    """All tokens and heads, in tiles."""
    single(op, step, num_threads, 5, False, ROWS, num_threads > 1)


@kernel
def attention_bf16(op, step, thread, num_threads):
    paired(op, step, num_threads, 5, False, ROWS, num_threads > 1)


@kernel
def gated_attention(op, step, thread, num_threads):
    """The same, each output times the sigmoid of its gate."""
    single(op, step, num_threads, 6, True, ROWS, num_threads > 1)


@kernel
def gated_attention_bf16(op, step, thread, num_threads):
    paired(op, step, num_threads, 6, True, ROWS, num_threads > 1)


@kernel
def attention_per_token(op, step, thread, num_threads):
    """One token and one head at a time: nothing is shared."""
    single(op, step, num_threads, 5, False, min(num_threads, 1), False)


@kernel
def attention_bf16_per_token(op, step, thread, num_threads):
    paired(op, step, num_threads, 5, False, min(num_threads, 1), False)


@kernel
def gated_attention_per_token(op, step, thread, num_threads):
    """One token and one head at a time, gated."""
    single(op, step, num_threads, 6, True, min(num_threads, 1), False)


@kernel
def gated_attention_bf16_per_token(op, step, thread, num_threads):
    paired(op, step, num_threads, 6, True, min(num_threads, 1), False)


# pairs are flushed step by step; where that takes a mode it is the whole op's, which `cleared` makes invisible
CPU = {
    "attention": Implementation(attention),
    "gated_attention": Implementation(gated_attention),
    "attention_bf16": Implementation(attention_bf16, flushes=True),
    "gated_attention_bf16": Implementation(gated_attention_bf16, flushes=True),
}
PER_TOKEN = {
    "attention": Implementation(attention_per_token),
    "gated_attention": Implementation(gated_attention_per_token),
    "attention_bf16": Implementation(attention_bf16_per_token, flushes=True),
    "gated_attention_bf16": Implementation(gated_attention_bf16_per_token, flushes=True),
}
