"""What enters attention over an 8-bit cache: the fast kernel. `kv_cache_cpu`, and K and V quantized on their way.

Four values that share a row of their page are written together, a whole line at a time.
"""

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.numbers import int8, int32
from lockstep.native.simd import (
    bf16_bits,
    bit_and,
    lanes,
    load,
    max_lanes,
    maximum,
    peek,
    poke,
    rint,
    round_bf16,
    store,
    store_i8,
    to_i32,
)
from lockstep.ops.attention.kv_cache_cpu import prepare, slot_of
from lockstep.ops.attention.kv_cache_q8 import ONE, head_place, k_place, scale_place, v_place
from lockstep.ops.elementwise.activations import ONE_127TH, SMALLEST, ZERO, magnitude
from lockstep.ops.elementwise.activations_cpu import finite
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import entry

BYTE, TWO_BYTES, THREE_BYTES = np.int32(1 << 8), np.int32(1 << 16), np.int32(1 << 24)


@inlined
def keep_scale(x, K, place):
    """Writes the scale of K float32 at x; returns what they are multiplied with."""
    top = lanes(ZERO)
    for i in range(0, 4 * K, 64):
        top = maximum(magnitude(load(x + i)), top)
    amax = max_lanes(top)
    scale = round_bf16(amax * ONE_127TH)
    inverse = ONE / scale
    if amax < SMALLEST:
        scale, inverse = ZERO, ZERO
    poke(place, bf16_bits(scale))
    return inverse


@inlined
def codes_of(x, inverse):
    """Sixteen codes as int32."""
    return to_i32(rint(finite(load(x)) * inverse))


@inlined
def write_codes(x, K, inverse, out):
    """The codes of K float32 at x, as bytes."""
    for d in range(0, K, 16):
        store_i8(out + d, codes_of(x + 4 * d, inverse))


@inlined
def keep_key(a, k, page, slot, g):
    """Scatters a key over its page, four dimensions every 64 of them. Its codes take the place of its numbers."""
    K, head = a.head_dim, a.k_pages + head_place(page, g, a.num_kv_heads, a.head_dim)
    write_codes(k, K, keep_scale(k, K, head + scale_place(slot, K)), k)
    for d in range(0, K, 4):
        poke(head + k_place(slot, d), peek(k + d, int32))


@inlined
def keep_values(a, batch, first, last, g, memory):
    """One kv head's values of tokens first .. last: by four where they fill a row. memory: scratch for a head."""
    K, row, t = a.head_dim, 4 * a.row_width, first
    while t < last:
        request, page, slot = slot_of(a, batch, t)
        v, head = a.x + row * t + 4 * (a.v_offset + g * K), a.v_pages + head_place(page, g, a.num_kv_heads, K)
        if slot % 4 == 0 and t + 3 < last and entry(batch.request, t + 3) == request:
            keep_four_values(v, row, head, slot, K)
            t += 4
        else:
            write_codes(v, K, keep_scale(v, K, head + scale_place(slot, K)), memory)
            for d in range(K):
                poke(head + v_place(slot, d, K), peek(memory + d, int8))
            t += 1


@inlined
def keep_four_values(v, row, head, slot, K):
    """The values of four neighbouring positions, `row` bytes from each other."""
    first, second, third, last = (
        keep_scale(v, K, head + scale_place(slot, K)),
        keep_scale(v + row, K, head + scale_place(slot + 1, K)),
        keep_scale(v + 2 * row, K, head + scale_place(slot + 2, K)),
        keep_scale(v + 3 * row, K, head + scale_place(slot + 3, K)),
    )
    for d in range(0, K, 16):
        x = v + 4 * d
        low = bit_and(codes_of(x, first), 255) + bit_and(codes_of(x + row, second), 255) * BYTE
        high = bit_and(codes_of(x + 2 * row, third), 255) * TWO_BYTES + codes_of(x + 3 * row, last) * THREE_BYTES
        store(head + v_place(slot, d, K), low + high)


@kernel
def attention_inputs_q8(op, step, thread, num_threads):
    """8-bit pages."""
    prepare(op, step, thread, num_threads, keep_key, keep_values)


CPU = {"attention_inputs_q8": Implementation(attention_inputs_q8)}
