"""The op that prepares attention's inputs, for an 8-bit cache: the fast kernel. As `kv_cache_cpu`, with K and V
quantized as they are written.

Four values that share a row of their page are written together, a whole cache line at a time.
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
from lockstep.ops.attention.kv_cache_cpu import MAX_HEAD_BYTES, prepare, slot_of, values_of
from lockstep.ops.attention.kv_cache_q8 import head_place, k_place, scale_place, v_place
from lockstep.ops.elementwise.activations import ONE_127TH, SMALLEST, finite, magnitude
from lockstep.ops.math import ONE, ZERO
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import entry

BYTE, TWO_BYTES, THREE_BYTES = np.int32(1 << 8), np.int32(1 << 16), np.int32(1 << 24)


@inlined
def write_scale(x, K, place):
    """Writes the scale of K float32 at x; returns the factor that turns them into codes."""
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
    """The codes of sixteen float32 at x, as int32."""
    return to_i32(rint(finite(load(x)) * inverse))


@inlined
def write_codes(x, K, inverse, out):
    """Writes the codes of K float32 at x to out, as bytes."""
    for d in range(0, K, 16):
        store_i8(out + d, codes_of(x + 4 * d, inverse))


@inlined
def write_key(a, k, page, slot, g):
    """Scatters a key over its page: four dimensions in each row. Its codes overwrite its numbers at k."""
    K, head = a.head_dim, a.k_pages + head_place(page, g, a.num_kv_heads, a.head_dim)
    write_codes(k, K, write_scale(k, K, head + scale_place(slot, K)), k)
    for d in range(0, K, 4):
        poke(head + k_place(slot, d), peek(k + d, int32))


@inlined
def write_values(a, batch, first, end, g, memory):
    """Writes one kv head's values of tokens first .. end - 1: four at a time where they fill a row. memory: scratch for
    five heads."""
    K, t, codes = a.head_dim, first, memory + 4 * MAX_HEAD_BYTES
    while t < end:
        request, page, slot = slot_of(a, batch, t)
        head = a.v_pages + head_place(page, g, a.num_kv_heads, K)
        if slot % 4 == 0 and t + 3 < end and entry(batch.request, t + 3) == request:
            v, row_bytes = values_of(a, t, 4, g, memory)
            write_four_values(v, row_bytes, head, slot, K)
            t += 4
        else:
            v, row_bytes = values_of(a, t, 1, g, memory)
            write_codes(v, K, write_scale(v, K, head + scale_place(slot, K)), codes)
            for d in range(K):
                poke(head + v_place(slot, d, K), peek(codes + d, int8))
            t += 1


@inlined
def write_four_values(v, row_bytes, head, slot, K):
    """Writes the values of four neighbouring positions, which lie row_bytes apart."""
    first, second, third, last = (
        write_scale(v, K, head + scale_place(slot, K)),
        write_scale(v + row_bytes, K, head + scale_place(slot + 1, K)),
        write_scale(v + 2 * row_bytes, K, head + scale_place(slot + 2, K)),
        write_scale(v + 3 * row_bytes, K, head + scale_place(slot + 3, K)),
    )
    for d in range(0, K, 16):
        x = v + 4 * d
        low = bit_and(codes_of(x, first), 255) + bit_and(codes_of(x + row_bytes, second), 255) * BYTE
        high = bit_and(codes_of(x + 2 * row_bytes, third), 255) * TWO_BYTES
        high = high + codes_of(x + 3 * row_bytes, last) * THREE_BYTES
        store(head + v_place(slot, d, K), low + high)


@kernel
def attention_inputs_q8(op, step, thread, num_threads):
    """For 8-bit pages."""
    prepare(op, step, thread, num_threads, write_key, write_values)


CPU = {"attention_inputs_q8": Implementation(attention_inputs_q8)}
