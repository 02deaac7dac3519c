"""The 8-bit KV cache: int8 codes with one bfloat16 scale for each token and kv head, x = scale * code. The definitions.

A head of a page is 64 (K + 2) bytes, its codes and then its scales, so that both are read as one stream:

    K    codes [K / 4, 64, 4]: four dimensions of 64 keys a row      scales [64]
    V    codes [16, K, 4]: all dimensions of four values a row       scales [64]

Four neighbours in a sum lie together, as the instructions for dots of four want them.
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.numbers import int8
from lockstep.native.simd import bf16_bits, maximum, peek, peek_bf16, poke, rint, round_bf16, to_i32
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, SCALE_BYTES, AttentionInputs, token_inputs
from lockstep.ops.elementwise.activations import INFINITY, ONE_127TH, SMALLEST, magnitude
from lockstep.ops.math import ONE, ZERO
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, num_rows


@inlined
def head_place(page, g, G, K):
    """Where a head begins, in bytes from the first page."""
    return (page * G + g) * PAGE_TOKENS * (K + SCALE_BYTES)


@inlined
def scale_place(slot, K):
    """Where a slot's scale lies, in bytes from the start of its head."""
    return PAGE_TOKENS * K + SCALE_BYTES * slot


@inlined
def k_place(slot, d):
    """Where the code of dimension d of a slot's key lies, in bytes from the start of its head."""
    return (d // 4 * PAGE_TOKENS + slot) * 4 + d % 4


@inlined
def v_place(slot, d, K):
    """Where the code of dimension d of a slot's value lies, in bytes from the start of its head."""
    return (slot // 4 * K + d) * 4 + slot % 4


@definition
def quantize_head(x_K, codes_K):
    """Quantizes a key or a value, [K] float32, to int8 codes; returns the scale.

    Error: half a code, at most (1 + 2**-8) amax / 254. Order: amax exactly; scale = bfloat16(amax * (1 / 127)), to
      nearest even; inverse = 1 / scale; code = rint(x * inverse), ties to even, which is at most 127 in size since
      rounding changes a scale by at most 2**-9 of it. With amax < 1e-30 scale and codes are zero. With a NaN or an
      infinity the codes are zero and the scale is infinite, so that products with it are NaN.
    """
    amax = ZERO
    for d in range(x_K.size):
        amax = maximum(magnitude(x_K[d]), amax)
    if amax == INFINITY:
        codes_K[:] = np.int8(0)
        return INFINITY
    if amax < SMALLEST:
        codes_K[:] = np.int8(0)
        return ZERO
    scale = round_bf16(amax * ONE_127TH)
    inverse = ONE / scale
    for d in range(x_K.size):
        codes_K[d] = np.int8(to_i32(rint(x_K[d] * inverse)))
    return scale


@definition
def read_key(head, slot, codes_K):
    """Reads the codes of a slot's key in a head of K; returns the scale."""
    for d in range(codes_K.size):
        codes_K[d] = peek(head + k_place(slot, d), int8)
    return peek_bf16(head + scale_place(slot, codes_K.size))


@definition
def read_value(head, slot, codes_K):
    """Reads the codes of a slot's value in a head of V; returns the scale."""
    for d in range(codes_K.size):
        codes_K[d] = peek(head + v_place(slot, d, codes_K.size), int8)
    return peek_bf16(head + scale_place(slot, codes_K.size))


@kernel
def _run(op, step, thread, num_threads):
    """For every token: its query heads go to q, its keys and values, quantized, to the cache."""
    if thread == 0:
        a, batch = AttentionInputs.read(op), StepBlock.read(step)
        G, K = a.num_kv_heads, a.head_dim
        codes_K = np.empty(K, np.int8)
        for t in range(num_rows(op, step)):
            k_GK, v_GK, page, slot = token_inputs(a, batch, t)
            for g in range(G):
                k, v = a.k_pages + head_place(page, g, G, K), a.v_pages + head_place(page, g, G, K)
                poke(k + scale_place(slot, K), bf16_bits(quantize_head(k_GK[g], codes_K)))
                for d in range(K):
                    poke(k + k_place(slot, d), codes_K[d])
                poke(v + scale_place(slot, K), bf16_bits(quantize_head(v_GK[g], codes_K)))
                for d in range(K):
                    poke(v + v_place(slot, d, K), codes_K[d])


REFERENCE = {"attention_inputs_q8": Implementation(_run)}
