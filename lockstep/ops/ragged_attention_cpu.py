"""Attention of a ragged batch over pages of any size: the fast kernel.

Many rows are bound by arithmetic, few rows by the read of K and V (2 * kv heads * head_dim numbers a token of context).
What each thread works on follows from cu_q_lens, kv_lens and num_seqs while it runs: nothing is prepared on the host.
The work is cut into tiles of up to 96 rows, which threads claim one by one: the few tokens of a sequence with all
heads, or some tokens of many with one kv head. Where tiles are few, each is cut again into spans of 1024 keys, whose
results are merged in ascending order, whoever computed them: the thread that has one waits for its turn.
"""

import numpy as np
from numba import float32, int32, int64

from lockstep.ops.attention_math import SPAN, ZERO, cleared, exp2
from lockstep.ops.ragged_attention import kept_share
from lockstep.ops.ragged_block import (
    LANE,
    LANE_BYTES,
    ROW_BYTES,
    ROWS,
    SCRATCH_BYTES,
    TOP,
    Call,
    O,
    Q,
    Tile,
    attend_span,
    first_key,
)
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.machine import fetch_add, load_acquire, pause, stack_memory, yield_core
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
from lockstep.runtime.step import COUNTER, number, word

TILES_PER_THREAD = 4  # with fewer, tiles are cut into spans
STATE_ROW_BYTES = ROW_BYTES + 64  # of a tile's state: the sums of values, then the largest score and the sum of weights
STATE_BYTES = ROWS * STATE_ROW_BYTES


@inlined
def read_call(op):
    """The op's operands, in the order of `Call`."""
    return Call(
        word(op, 0),
        word(op, 1),
        word(op, 2),
        word(op, 3),
        word(op, 4),
        word(op, 5),
        word(op, 6),
        word(op, 7),
        word(op, 8),
        word(op, 9),
        word(op, 10),
        word(op, 11),
        word(op, 12),
        word(op, 13),
        word(op, 14),
        word(op, 15),
        word(op, 16),
        word(op, 17),
        word(op, 18),
        word(op, 19),
        word(op, 20),
        word(op, 21),
        word(op, 22),
        word(op, 23),
        word(op, 24),
        word(op, 25),
        word(op, 26),
        word(op, 27),
        word(op, 28),
        word(op, 29),
        word(op, 30),
        number(op, 31),
        number(op, 32),
        number(op, 33),
    )


@inlined
def query_start(call, s):
    return np.int64(peek(call.cu_q_lens + 4 * s, int32))


@inlined
def kv_len(call, s):
    return np.int64(peek(call.kv_lens + 4 * s, int32))


@inlined
def num_seqs(call):
    return np.int64(peek(call.num_seqs, int32))


@inlined
def tile_shape(call, tokens, together):
    """(units, tokens) of the tiles of a sequence with so many tokens: of equal size, as far as that goes."""
    units, most = call.heads // call.group, ROWS // call.group
    if together and tokens * call.heads <= ROWS:
        return units, tokens
    count = (tokens + most - 1) // most
    return 1, (tokens + count - 1) // count


@inlined
def count_work(call, together):
    """(tiles, items): an item is a span of a tile; and the number of spans of the longest sequence."""
    tiles, items, spans = int64(0), int64(0), int64(0)
    for s in range(num_seqs(call)):
        tokens, length = query_start(call, s + 1) - query_start(call, s), kv_len(call, s)
        if tokens > 0:
            units, rows = tile_shape(call, tokens, together)
            count = call.heads // call.group // units * ((tokens + rows - 1) // rows)
            own = (length - 1) // SPAN + 1
            tiles, items, spans = tiles + count, items + count * own, max(spans, own)
    return tiles, items, spans


@inlined
def run(op, thread, num_threads):
    """One thread: it walks the same list of items as every other and works on those it has claimed.

    An item is a tile or, where tiles are cut, one span of a tile, spans outermost, so that neighbours in the list can
    run together. Later tokens, which see more keys, come first.
    """
    call, counter, memory = read_call(op), peek(op + 8 * COUNTER, int64), stack_memory(SCRATCH_BYTES)
    clear_padding(call, thread, num_threads)
    together, enough = True, TILES_PER_THREAD * num_threads
    tiles, items, spans = count_work(call, together)
    if num_threads > 1 and items < enough:
        together = False
        tiles, items, spans = count_work(call, together)
    cut = num_threads > 1 and tiles < enough
    index, claimed = int64(0), fetch_add(counter, 1)
    for turn in range(spans if cut else min(spans, 1)):
        passed = int64(0)
        for s in range(num_seqs(call)):
            start, tokens = query_start(call, s), query_start(call, s + 1) - query_start(call, s)
            if tokens == 0:
                continue
            units, rows = tile_shape(call, tokens, together)
            across = call.heads // call.group // units
            count = across * ((tokens + rows - 1) // rows)
            for i in range(count):
                if not cut and index != claimed:
                    index += 1
                    continue
                begin = ((count - 1 - i) // across) * rows
                position = kv_len(call, s) - tokens + begin
                tile = Tile(
                    start + begin,
                    min(rows, tokens - begin),
                    position,
                    i % across * units,
                    units,
                    call.page_indices + call.table_row * s,
                )
                first, last = first_key(call, position) // SPAN, (position + tile.tokens - 1) // SPAN
                if cut and not first <= turn <= last:
                    continue
                if index == claimed:
                    load_queries(call, tile, memory)
                    state = call.states + STATE_BYTES * (passed + i if cut else thread)
                    for span in range(turn if cut else first, (turn if cut else last) + 1):
                        attend_span(call, tile, span, memory)
                        if cut:
                            wait_for_turn(call.turns + 64 * (passed + i), span - first)
                        end_span(call, tile, span, memory, state)
                        if cut:
                            fetch_add(call.turns + 64 * (passed + i), 1)
                    claimed = fetch_add(counter, 1)
                index += 1
            passed += count


@inlined
def wait_for_turn(turns, number_of_spans):
    """Waits until so many spans of the tile are merged: they were claimed earlier, so someone is working on them."""
    spins = 0
    while load_acquire(turns) != number_of_spans:
        pause()
        spins += 1
        if spins > 50:
            yield_core()


@inlined
def load_queries(call, tile, memory):
    """The tile's queries, scaled, one row after the other."""
    row = memory + Q
    for u in range(tile.units):
        for t in range(tile.tokens):
            for h in range(call.group):
                source = call.q + call.q_token * (tile.token + t) + call.q_head * ((tile.unit + u) * call.group + h)
                for d in range(0, call.head_dim, 16):
                    q = load_bf16(source + 2 * d) if call.q_bf16 else load(source + 4 * d)
                    store(row + 4 * d, cleared(q * call.scale))
                row += ROW_BYTES


@inlined
def end_span(call, tile, span, memory, state):
    """Merges a finished span into the rows that see it, and finishes the rows whose last one it is."""
    row = int64(0)
    for u in range(tile.units):
        for t in range(tile.tokens):
            first, last = first_key(call, tile.position + t) // SPAN, (tile.position + t) // SPAN
            for h in range(call.group):
                if first <= span <= last:
                    o, kept = memory + O + ROW_BYTES * row, state + STATE_ROW_BYTES * row
                    head = (tile.unit + u) * call.group + h
                    top = peek(memory + TOP + 4 * row, float32)
                    total = sum_lanes(load(memory + LANE + LANE_BYTES * row))
                    if span > first:
                        top, total = merge(call, kept, top, total, o)
                    if span < last:
                        keep(call, kept, top, total, o)
                    else:
                        out = call.out + call.out_token * (tile.token + t) + call.out_head * head
                        finish(call, out, head, top, total, o)
                row += 1


@inlined
def merge(call, kept, top, total, o):
    """What earlier spans left joins the row at o; returns its maximum and sum."""
    before = peek(kept + ROW_BYTES, float32)
    higher = maximum(top, before)
    a, b = exp2(before - higher), exp2(top - higher)
    for i in range(0, 4 * call.head_dim, 64):
        store(o + i, cleared(fma(load(kept + i), a, cleared(load(o + i) * b))))
    return higher, fma(peek(kept + ROW_BYTES + 4, float32), a, total * b)


@inlined
def keep(call, kept, top, total, o):
    """Leaves a row for the next span."""
    for i in range(0, 4 * call.head_dim, 64):
        store(kept + i, load(o + i))
    poke(kept + ROW_BYTES, top)
    poke(kept + ROW_BYTES + 4, total)


@inlined
def finish(call, out, head, top, total, o):
    """The row's output."""
    share = kept_share(top, total, peek(call.sinks + 4 * head, float32)) if call.sinks != 0 else total
    for d in range(0, call.head_dim, 16):
        value = cleared(load(o + 4 * d) / total)
        if call.sinks != 0:
            value = value * share
        store_output(call, out, d, value * call.v_scale)


@inlined
def store_output(call, out, d, value):
    """Sixteen numbers of an output row, in its type."""
    if call.q_bf16:
        store_bf16(out + 2 * d, round_bf16(value))
    else:
        store(out + 4 * d, value)


@inlined
def clear_padding(call, thread, num_threads):
    """Zeros to the rows of no sequence, dealt in turn."""
    for t in range(query_start(call, num_seqs(call)) + thread, call.num_tokens, num_threads):
        for h in range(call.heads):
            out = call.out + call.out_token * t + call.out_head * h
            for d in range(0, call.head_dim, 16):
                store_output(call, out, d, lanes(ZERO))


@kernel
def ragged_attention(op, step, thread, num_threads):
    """All sequences and heads; the step is not used."""
    run(op, thread, num_threads)
