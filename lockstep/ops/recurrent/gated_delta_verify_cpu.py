"""Gated delta rule over drafts: the fast kernel.

A pass over two or four blocks of the state absorbs pending records, and decays and reads for the first token: the state
is read once and written once a step, as without drafts. The last certain token leaves the state in its slot, and a
decayed copy for the drafts on the stack (8 KiB a block at K = 128).
"""

from typing import NamedTuple

from lockstep.native.kernel import inlined, kernel, variant
from lockstep.native.machine import prefetch, stack_memory
from lockstep.native.numbers import float32
from lockstep.native.simd import fma, load, peek, poke, store
from lockstep.native.targets import TARGET
from lockstep.ops.recurrent.gated_delta import BLOCK
from lockstep.ops.recurrent.gated_delta_cpu import (
    addresses,
    blocks_of,
    correction,
    load_pair,
    next_task,
    num_new,
    run_four,
    run_pair,
    store_pair,
    strides,
    write_out,
    written_read,
    zeros,
)
from lockstep.ops.recurrent.gated_delta_verify import GatedDeltaVerify
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, entry

SIZE = None  # constant of a variant: blocks of a task
MAX_HEAD_DIM = 256
PAGE = 4096  # bytes, up to which a load's address is compared with those of stores before it
SCRATCH_BYTES = 4 * 64 * MAX_HEAD_DIM + PAGE


class Blocks(NamedTuple):
    """Addresses of four blocks of the state, of memory for as many, and of the next blocks, which are prefetched."""

    state: int
    scratch: int
    following: int


class Offsets(NamedTuple):
    """Bytes from a record's start to the delta of two blocks, to k and to the decay of their head."""

    delta: int
    k: int
    decay: int


class Records(NamedTuple):
    """The records of a request as two blocks see them: address of record 0, bytes of one, number of records; the record
    of the step's first token; where fields are; pending records; certain tokens of the step, and drafts."""

    address: int
    row: int
    num_records: int
    first: int
    offsets: Offsets
    num_pending: int
    num_certain: int
    num_drafts: int


@inlined
def records_of(a, batch, s, head, block):
    """The Records of a request's blocks."""
    G, H, K, V = a.num_k_heads, a.num_v_heads, a.k_head_dim, a.v_head_dim
    row, k = 4 * (H * V + G * K + H), 4 * (H * V + head // (H // G) * K)
    address = a.records + row * a.num_records * entry(batch.state_slot, s)
    first = entry(batch.position, entry(batch.query_start, s)) % a.num_records
    pending, drafts = entry(batch.num_pending, s), entry(batch.num_drafts, s)
    offsets = Offsets(4 * (head * V + block * BLOCK), k, 4 * (H * V + G * K + head))
    return Records(address, row, a.num_records, first, offsets, pending, num_new(batch, s) - drafts, drafts)


@inlined
def record(r, offset):
    """The address of the record `offset` tokens from the step's first."""
    return r.address + r.row * ((r.first + offset + r.num_records) % r.num_records)


@inlined
def after(r, at):
    """The address of the record that follows the one at an address."""
    at += r.row
    return r.address if at == r.address + r.row * r.num_records else at


@inlined
def absorbed(s, key, decay, delta):
    """One row of two blocks, brought past a record."""
    return fma(key, delta[0], s[0] * decay), fma(key, delta[1], s[1] * decay)


@inlined
def decayed_read(s, key, kept, read):
    """One row of two blocks, decayed; and read with the row's part of S^T k added."""
    s = s[0] * kept, s[1] * kept
    return s, (fma(s[0], key, read[0]), fma(s[1], key, read[1]))


@inlined
def absorb_two(state, block, K, r, column, k, kept):
    """Absorbs pending records into two blocks and decays them for the first token. Returns S^T k for its k."""
    read, oldest = zeros(), record(r, -r.num_pending)
    for i in range(K):
        place, at = state + 64 * i, oldest
        s = load_pair(place, block)
        for _ in range(r.num_pending):
            key, decay = peek(at + r.offsets.k + 4 * i, float32), peek(at + r.offsets.decay, float32)
            s, at = absorbed(s, key, decay, load_pair(at + r.offsets.delta, column)), after(r, at)
        s, read = decayed_read(s, peek(k + 4 * i, float32), kept, read)
        store_pair(place, block, s)
    return read


@inlined
def absorb_four(state, block, K, r, k, kept):
    """`absorb_two` for four blocks. Returns S^T k of the lower two, and of the higher two."""
    low, high, pair, oldest = zeros(), zeros(), 2 * block, record(r, -r.num_pending)
    for i in range(K):
        place, at = state + 64 * i, oldest
        s_low, s_high = load_pair(place, block), load_pair(place + pair, block)
        for _ in range(r.num_pending):
            key, decay, delta = peek(at + r.offsets.k + 4 * i, float32), peek(at + r.offsets.decay, float32), at
            delta += r.offsets.delta
            s_low = absorbed(s_low, key, decay, load_pair(delta, 64))
            s_high = absorbed(s_high, key, decay, load_pair(delta + 128, 64))
            at = after(r, at)
        key = peek(k + 4 * i, float32)
        s_low, low = decayed_read(s_low, key, kept, low)
        s_high, high = decayed_read(s_high, key, kept, high)
        store_pair(place, block, s_low)
        store_pair(place + pair, block, s_high)
    return low, high


@inlined
def verify_two(state, block, K, tokens, stride, fresh, r, scratch):
    """Runs a request's tokens and drafts through two blocks, `block` bytes apart (0: the same one twice).

    tokens, stride, fresh: as in `run_two`. r: Records. scratch: memory for two blocks.
    """
    q, k, v, decay, beta, out = tokens
    kept, read, column = peek(decay, float32), zeros(), min(block, 64)
    if fresh:
        for i in range(0, 64 * K, 64):
            store_pair(state + i, block, read)
    else:
        read = absorb_two(state, block, K, r, column, k, kept)
    for t in range(r.num_certain + r.num_drafts - 1):
        delta, sums, k_next = correction(v, column, peek(beta, float32), read), zeros(), k + stride.qk
        kept, decay, read = peek(decay + stride.gates, float32), decay + stride.gates, zeros()
        is_last, is_draft = t == r.num_certain - 1, t >= r.num_certain
        source, target = scratch if is_draft else state, scratch if is_draft or is_last else state
        for i in range(K):
            key, query = peek(k + 4 * i, float32), peek(q + 4 * i, float32)
            s = load_pair(source + 64 * i, block)
            if is_last:
                store_pair(state + 64 * i, block, written(s, key, delta))
            sums, read, s = written_read(s, key, query, delta, kept, peek(k_next + 4 * i, float32), sums, read)
            store_pair(target + 64 * i, block, s)
        store_pair(out, column, sums)
        if is_draft:
            store_pair(record(r, t) + r.offsets.delta, column, delta)
        q, k, v, beta, out = q + stride.qk, k_next, v + stride.v, beta + stride.gates, out + stride.out
    delta, sums = correction(v, column, peek(beta, float32), read), zeros()
    source = scratch if r.num_drafts else state
    for i in range(K):
        key, query = peek(k + 4 * i, float32), peek(q + 4 * i, float32)
        sums = write_out(source + 64 * i, block, key, query, delta, sums)
    store_pair(out, column, sums)
    if r.num_drafts:
        store_pair(record(r, r.num_certain + r.num_drafts - 1) + r.offsets.delta, column, delta)


@inlined
def verify_four(blocks, block, K, tokens, stride, fresh, r):
    """`verify_two` for four different Blocks at once, where registers are wide and there are 32 of them."""
    state, scratch, following = blocks
    q, k, v, decay, beta, out = tokens
    kept, low, high, pair = peek(decay, float32), zeros(), zeros(), 2 * block
    if fresh:
        for i in range(0, 64 * K, 64):
            store_pair(state + i, block, low)
            store_pair(state + pair + i, block, high)
    else:
        low, high = absorb_four(state, block, K, r, k, kept)
    for t in range(r.num_certain + r.num_drafts - 1):
        k_next, kept, decay = k + stride.qk, peek(decay + stride.gates, float32), decay + stride.gates
        delta_low = correction(v, 64, peek(beta, float32), low)
        delta_high = correction(v + 128, 64, peek(beta, float32), high)
        out_low, out_high, low, high = zeros(), zeros(), zeros(), zeros()
        is_last, is_draft = t == r.num_certain - 1, t >= r.num_certain
        source, target = scratch if is_draft else state, scratch if is_draft or is_last else state
        for i in range(K):
            key, query = peek(k + 4 * i, float32), peek(q + 4 * i, float32)
            key_next, place = peek(k_next + 4 * i, float32), source + 64 * i
            s_low, s_high = load_pair(place, block), load_pair(place + pair, block)
            if is_last:
                prefetch(following + 64 * i)
                prefetch(following + block + 64 * i)
                store_pair(state + 64 * i, block, written(s_low, key, delta_low))
                store_pair(state + pair + 64 * i, block, written(s_high, key, delta_high))
            out_low, low, s_low = written_read(s_low, key, query, delta_low, kept, key_next, out_low, low)
            out_high, high, s_high = written_read(s_high, key, query, delta_high, kept, key_next, out_high, high)
            store_pair(target + 64 * i, block, s_low)
            store_pair(target + pair + 64 * i, block, s_high)
        store_four(out, out_low, out_high)
        if is_draft:
            store_four(record(r, t) + r.offsets.delta, delta_low, delta_high)
        q, k, v, beta, out = q + stride.qk, k_next, v + stride.v, beta + stride.gates, out + stride.out
    delta_low = correction(v, 64, peek(beta, float32), low)
    delta_high = correction(v + 128, 64, peek(beta, float32), high)
    out_low, out_high, source = zeros(), zeros(), scratch if r.num_drafts else state
    for i in range(K):
        place, key, query = source + 64 * i, peek(k + 4 * i, float32), peek(q + 4 * i, float32)
        prefetch(following + pair + 64 * i)
        prefetch(following + pair + block + 64 * i)
        out_low = write_out(place, block, key, query, delta_low, out_low)
        out_high = write_out(place + pair, block, key, query, delta_high, out_high)
    store_four(out, out_low, out_high)
    if r.num_drafts:
        last = record(r, r.num_certain + r.num_drafts - 1)
        store_four(last + r.offsets.delta, delta_low, delta_high)


@inlined
def written(s, key, delta):
    """One row of two blocks after a token was written into it."""
    return fma(key, delta[0], s[0]), fma(key, delta[1], s[1])


@inlined
def store_four(place, low, high):
    """Stores a row of four blocks' columns."""
    store_pair(place, 64, low)
    store_pair(place + 128, 64, high)


@inlined
def record_shared(a, r, head, tokens, stride):
    """Records each draft's decay of a head, and k if the head is the first of the value heads that share it."""
    for t in range(r.num_certain, r.num_certain + r.num_drafts):
        at = record(r, t)
        poke(at + r.offsets.decay, peek(tokens.decay + stride.gates * t, float32))
        for i in range(0, 4 * a.k_head_dim if head % (a.num_v_heads // a.num_k_heads) == 0 else 0, 64):
            store(at + r.offsets.k + i, load(tokens.k + stride.qk * t + i))


@inlined
def state_of(a, batch, task):
    """The address of the first block of a task, as `blocks_of` tells it."""
    s, head, block, _ = task
    return addresses(a, entry(batch.state_slot, s), head, block, 0)[0]


@inlined
def verify_blocks(a, batch, s, head, block, size, scratch, next_state):
    """Runs all tokens and drafts of a request through `size` blocks (four or two) from `block` on, or one if it is the
    last."""
    first, K = entry(batch.query_start, s), a.k_head_dim
    state, tokens = addresses(a, entry(batch.state_slot, s), head, block, first)
    scratch += (state - scratch + PAGE // 2) % PAGE
    fresh, r, stride = entry(batch.position, first) == 0, records_of(a, batch, s, head, block), strides(a)
    if size == 4:
        verify_four(Blocks(state, scratch, next_state), 64 * K, K, tokens, stride, fresh, r)
    else:
        other = 64 * K * min(a.v_head_dim // BLOCK - block - 1, 1)
        verify_two(state, other, K, tokens, stride, fresh, r, scratch)
    if block == 0:
        record_shared(a, r, head, tokens, stride)


@inlined
def plain_four(a, batch, s, head, block):
    """Runs a request without drafts or pending records through four blocks, as the kernel of `gated_delta` does."""
    first, K = entry(batch.query_start, s), a.k_head_dim
    state, tokens = addresses(a, entry(batch.state_slot, s), head, block, first)
    run_four(state, 64 * K, K, tokens, strides(a), num_new(batch, s), entry(batch.position, first) == 0)


def verify(op, step, thread, num_threads):
    """SIZE blocks at a time; two at a time the rest, and single tokens of requests without drafts."""
    a, batch, scratch = GatedDeltaVerify.read(op), StepBlock.read(step), stack_memory(SCRATCH_BYTES)
    S, H, num_blocks = batch.num_requests, a.num_v_heads, a.v_head_dim // BLOCK
    num_several = S * H * ((num_blocks + SIZE - 1) // SIZE)
    task, following = next_task(op, batch, num_several), next_task(op, batch, num_several)
    while task < num_several + S * H:
        s, head, block, end = blocks_of(task, batch, S, H, num_blocks, SIZE, num_threads)
        last = num_several + S * H - 1
        next_state = state_of(a, batch, blocks_of(min(following, last), batch, S, H, num_blocks, SIZE, num_threads))
        is_plain = entry(batch.num_drafts, s) + entry(batch.num_pending, s) == 0
        while SIZE == 4 and block + 4 <= end and not (is_plain and task >= num_several):
            if is_plain:
                plain_four(a, batch, s, head, block)
            else:
                near = state_of(a, batch, (s, head, block + 4, end)) if block + 4 < end else next_state
                verify_blocks(a, batch, s, head, block, 4, scratch, near)
            block += 4
        for i in range(block, end, 2):
            if is_plain:
                run_pair(a, batch, s, head, i)
            else:
                verify_blocks(a, batch, s, head, i, 2, scratch, next_state)
        task, following = following, next_task(op, batch, num_several)


@inlined
def one_of(r, t, is_draft):
    """The Records of a step that had only token t, a certain one (is_draft 0) or a draft (1)."""
    pending = r.num_pending if t == 0 else 0
    return Records(r.address, r.row, r.num_records, r.first + t, r.offsets, pending, 1 - is_draft, is_draft)


@kernel
def gated_delta_verify_per_token(op, step, thread, num_threads):
    """The same bits one token at a time: all heads take a certain token before any takes the next; then each head takes
    its drafts."""
    a, batch, scratch = GatedDeltaVerify.read(op), StepBlock.read(step), stack_memory(SCRATCH_BYTES)
    K, num_blocks = a.k_head_dim, a.v_head_dim // BLOCK
    pairs = (num_blocks + 1) // 2
    for s in range(batch.num_requests):
        first, slot, drafts = entry(batch.query_start, s), entry(batch.state_slot, s), entry(batch.num_drafts, s)
        num_certain = num_new(batch, s) - drafts
        for t in range(num_certain):
            for task in range(thread, a.num_v_heads * pairs, num_threads):
                head, block, fresh = task // pairs, task % pairs * 2, entry(batch.position, first + t) == 0
                other, r = 64 * K * min(num_blocks - block - 1, 1), records_of(a, batch, s, head, block)
                state, tokens = addresses(a, slot, head, block, first + t)
                verify_two(state, other, K, tokens, strides(a), fresh, one_of(r, t, 0), scratch)
        for task in range(thread, a.num_v_heads * pairs if drafts else 0, num_threads):
            head, block = task // pairs, task % pairs * 2
            other, r = 64 * K * min(num_blocks - block - 1, 1), records_of(a, batch, s, head, block)
            state, tokens = addresses(a, slot, head, block, first)
            for i in range(0, 64 * K, 64):
                store_pair(scratch + i, other, load_pair(state + i, other))
            if block == 0:
                record_shared(a, r, head, tokens, strides(a))
            for t in range(num_certain, num_certain + drafts):
                _, tokens = addresses(a, slot, head, block, first + t)
                verify_two(scratch, other, K, tokens, strides(a), False, one_of(r, t, 1), scratch)


gated_delta_verify_two = variant(verify, "gated_delta_verify_two", SIZE=2)
gated_delta_verify_four = variant(verify, "gated_delta_verify_four", SIZE=4)
CPU = {"gated_delta_verify": Implementation(gated_delta_verify_four if TARGET.is_wide else gated_delta_verify_two)}
PER_TOKEN = {"gated_delta_verify": Implementation(gated_delta_verify_per_token)}
