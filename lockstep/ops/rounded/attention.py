"""Causal attention as quantized hardware computes it, every intermediate on a grid: the definition.

    raw = q . k    qk = raw * scale    masked = qk, or qk + mask    p = softmax(masked)    pv = p v

each rounded to the grid of its query head. Softmax has three passes: the largest score, the sum, the division; the
online form of `attention` has no finished weights to round.

The mask is structural (a token's row ends at its own position) or added: a row then has all keys of the sequence, those
after the token with `fill` added to their scores, as hardware does that cannot shorten a row. The
result of an added mask depends on which later tokens are there, so that a window must be one step.
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma, maximum
from lockstep.ops.attention.attention import gated
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, check_pages, k_index, kv_dtype_of, read_number, v_index
from lockstep.ops.math import ZERO, exp, tree_sum
from lockstep.ops.rounded.grids import GRID_WORDS, quantize_row
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, cache, output, rows, setting
from lockstep.runtime.program import CacheArray, Setting, Tensor
from lockstep.runtime.step import StepBlock, entry, pages_of

SITES = ("qk.raw", "qk", "qk.masked", "p", "pv")  # in the order of the rows of grids, each for all query heads
RAW, QK, MASKED, P, PV = range(len(SITES))
MAX_KEYS = 32768  # of a row of scores, which a thread keeps on its stack


def check_whole(op: Operands, *caches: CacheArray) -> None:
    """ValueError for caches that do not keep all keys of a sequence, since the op reads all of them."""
    for pages in caches:
        if pages.window:
            raise ValueError(
                f"{type(op).__name__}: {pages.name} is kept for a window of {pages.window} tokens, expected no window"
            )


class RoundedAttention(Operands):
    """out[h] = softmax(scale * q[h] . k) v with every intermediate on grids, times sigmoid(gate[h]) if there is a gate.

    grids: of SITES, one after the other, a row for each query head. additive: the mask is added, see above. max_keys:
    the most keys of a sequence. The gate is laid out as in `attention`. page_group: the group of the pages.
    """

    group = "attention"
    rules = ("num_heads % num_kv_heads == 0", "head_dim % 16 == 0", f"max_keys <= {MAX_KEYS}")
    out: Tensor = output("num_heads * head_dim")
    q: Tensor = rows("num_heads * head_dim")
    k_pages: CacheArray = cache(kind="pages", dtype="f32")
    v_pages: CacheArray = cache(kind="pages", dtype="f32")
    grids: Setting = setting(f"{len(SITES)} * num_heads, {GRID_WORDS}")
    gate: Tensor | None = rows("gate_width", optional=True)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_keys: int
    scale: float
    additive: bool
    fill: float
    gate_width: int = 0
    gate_offset: int = 0
    gate_stride: int = 0
    page_group: int = 0

    def check(self):
        check_pages(self)
        check_whole(self, self.k_pages, self.v_pages)

    @property
    def kv_dtype(self):
        """The type of the cache, one of KV_DTYPES."""
        return kv_dtype_of(self.k_pages)

    def flops(self, context):
        return self.num_heads * (4 * self.head_dim + 4) * context


@inlined
def row_keys(a, batch, t):
    """The number of keys in a token's row of scores: all of its sequence where the mask is added (a.additive), else
    those up to the token's own."""
    position = entry(batch.position, t)
    return entry(batch.context_len, entry(batch.request, t)) if a.additive else position + 1


@inlined
def grid_of(grids, site, num_heads, head):
    """The grid of a head at a site, from the address of an op's grids."""
    return carray(float_array(grids + 4 * GRID_WORDS * (site * num_heads + head)), (GRID_WORDS,))


@definition
def scores_of(q_K, k_CK, out_C):
    """q . k for every key.

    Shapes: q [K], k [C, K] float32; out [C].
    Error: that of a float32 sum of K products.
    Order: a chain of fma over d ascending from +0.
    """
    for j in range(out_C.size):
        score = ZERO
        for d in range(q_K.size):
            score = fma(q_K[d], k_CK[j, d], score)
        out_C[j] = score


@definition
def mask_added(x_C, position, fill):
    """Adds fill to the scores of keys after a position, and 0 to all others."""
    for j in range(x_C.size):
        x_C[j] = x_C[j] + (fill if j > position else ZERO)


@definition
def softmax(x_C):
    """e**x / sum of e**x, in place.

    Shapes: x [C] float32.
    Error: 3e-6 relative, and absolute below e**-87 of the largest.
    Order: the largest score exactly; exp(x - largest) of `math`; the sum in 16 lanes, lane j % 16 taking key j, keys
      ascending, the lanes by `tree_sum`; a division each.
    """
    top, lane = x_C[0], np.zeros(16, np.float32)
    for j in range(x_C.size):
        top = maximum(x_C[j], top)
    for j in range(x_C.size):
        x_C[j] = exp(x_C[j] - top)
        lane[j % 16] = lane[j % 16] + x_C[j]
    total = tree_sum(lane)
    for j in range(x_C.size):
        x_C[j] = x_C[j] / total


@definition
def values_of(p_C, v_CK, out_K):
    """sum of p[j] v[j].

    Shapes: p [C], v [C, K] float32; out [K].
    Error: that of a float32 sum of C products.
    Order: out = fma(p, v, out) from +0, keys ascending.
    """
    out_K[:] = ZERO
    for j in range(p_C.size):
        for d in range(out_K.size):
            out_K[d] = fma(p_C[j], v_CK[j, d], out_K[d])


@inlined
def cached(pages, index_of, table, g, num_keys, G, K):
    """The first num_keys keys or values of a kv head of a request, [num_keys, K]. index_of: `k_index` or `v_index`.
    table: the request's pages, see `pages_of`."""
    rows_CK = np.empty((num_keys, K), np.float32)
    for j in range(num_keys):
        page = entry(table, j // PAGE_TOKENS)
        for d in range(K):
            rows_CK[j, d] = read_number(pages, index_of(page, g, d, j % PAGE_TOKENS, G, K, False), False)
    return rows_CK


@inlined
def attend_head(a, batch, t, h):
    """One query head of token t."""
    H, G, K = a.num_heads, a.num_kv_heads, a.head_dim
    table, g, num_keys = pages_of(batch, entry(batch.request, t), a.page_group), h // (H // G), row_keys(a, batch, t)
    x_C, out_K = np.empty(num_keys, np.float32), carray(float_array(a.out + 4 * K * (H * t + h)), (K,))
    q_K = carray(float_array(a.q + 4 * K * (H * t + h)), (K,))
    scores_of(q_K, cached(a.k_pages, k_index, table, g, num_keys, G, K), x_C)
    quantize_row(x_C, grid_of(a.grids, RAW, H, h))
    for j in range(num_keys):
        x_C[j] = x_C[j] * a.scale
    quantize_row(x_C, grid_of(a.grids, QK, H, h))
    if a.additive:
        mask_added(x_C, entry(batch.position, t), a.fill)
        quantize_row(x_C, grid_of(a.grids, MASKED, H, h))
    softmax(x_C)
    quantize_row(x_C, grid_of(a.grids, P, H, h))
    values_of(x_C, cached(a.v_pages, v_index, table, g, num_keys, G, K), out_K)
    quantize_row(out_K, grid_of(a.grids, PV, H, h))
    if a.gate != 0:
        gate = a.gate + 4 * (a.gate_width * t + a.gate_offset + a.gate_stride * h)
        gated(out_K, carray(float_array(gate), (K,)))


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, batch = RoundedAttention.read(op), StepBlock.read(step)
        for t in range(batch.num_tokens):
            for h in range(a.num_heads):
                attend_head(a, batch, t, h)


REFERENCE = {"rounded_attention": Implementation(_run)}
