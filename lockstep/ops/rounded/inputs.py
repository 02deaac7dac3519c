"""The inputs of attention as quantized hardware computes them, every intermediate of norm and rotation on a grid.

A head x of a query or key, with the first 2 R of its channels rotated, halves x1 and x2:

    norm = rms_norm(x)            cat = (-x2, x1), or (x2, x1) where the table of sines has a negated first half
    cos = norm * (c, c)           sin = cat * (s, s), or cat * (-s, s)          rot = cos + sin, then the other channels

Each is rounded to the grid of its head; x1 and x2 are rounded copies that only `cat` reads. The products are rounded
before they are added, which `kv_cache` does in one operation. Keys and values are rounded once more for the cache.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array, kept_apart
from lockstep.native.numbers import carray
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, check_pages, k_index, kv_dtype_of, v_index, write_number
from lockstep.ops.elementwise.rms_norm import rms_norm
from lockstep.ops.rounded.grids import GRID_WORDS, quantize_row
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, cache, constant, output, rows, setting, table
from lockstep.runtime.program import CacheArray, Setting, Table, Tensor, Weight
from lockstep.runtime.step import StepBlock, entry, num_rows, pages_of

SITES = ("norm", "x1", "x2", "cat", "cos", "sin", "rot", "all")  # in the order of rows of grids; q has no "all"
NORM, X1, X2, CAT, COS, SIN, ROT, ALL = range(len(SITES))
Q_SITES, K_SITES = len(SITES) - 1, len(SITES)
TABLE_SITES = ("rope.cos", "rope.sin")


class Norm(NamedTuple):
    """The norm of a head: its weight [K], or [0] for none, eps, and what is added to the weight."""

    weight_K: np.ndarray
    eps: float
    offset: float


class Rope(NamedTuple):
    """cos and sin of a position, [2 R] each, on their grids."""

    cos_2R: np.ndarray
    sin_2R: np.ndarray


class RoundedInputs(Operands):
    """q = rope(norm(heads of x)); keys, likewise, and values go to their pages: `attention_inputs` with every
    intermediate on a grid.

    q_grids, k_grids: of SITES, one after the other, a row for each head. v_grids: of cached values. rope_grids: of
    TABLE_SITES. pre_negated: the table of sines has a negated first half. Other operands as in `attention_inputs`.
    """

    group = "attention"
    rules = ("num_heads % num_kv_heads == 0", "rope_dim % 2 == 0", "rope_dim <= head_dim", "head_dim % 16 == 0")
    q: Tensor = output("num_heads * head_dim")
    x: Tensor = rows("row_width")
    cos: Table = table()
    sin: Table = table()
    k_pages: CacheArray = cache(kind="pages", dtype="f32")
    v_pages: CacheArray = cache(kind="pages", dtype="f32")
    q_grids: Setting = setting(f"{Q_SITES} * num_heads, {GRID_WORDS}")
    k_grids: Setting = setting(f"{K_SITES} * num_kv_heads, {GRID_WORDS}")
    v_grids: Setting = setting(f"num_kv_heads, {GRID_WORDS}")
    rope_grids: Setting = setting(f"{len(TABLE_SITES)}, {GRID_WORDS}")
    q_norm: Weight | None = constant("head_dim", optional=True)
    k_norm: Weight | None = constant("head_dim", optional=True)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int
    row_width: int
    q_offset: int
    q_stride: int
    k_offset: int
    v_offset: int
    eps: float
    norm_offset: float
    pre_negated: bool
    page_group: int = 0

    def check(self):
        check_pages(self)

    @property
    def kv_dtype(self):
        """The type of the cache, one of KV_DTYPES."""
        return kv_dtype_of(self.k_pages)

    def flops(self, context):
        return (self.num_heads + self.num_kv_heads) * 4 * self.rope_dim


@definition
def doubled(values_R, negated, out_2R):
    """The values of a position twice, the first half negated if `negated`."""
    R = values_R.size
    for i in range(R):
        out_2R[i] = -values_R[i] if negated else values_R[i]
        out_2R[R + i] = values_R[i]


@definition
def swapped_halves(x1_R, x2_R, pre_negated, out_2R):
    """cat, from the halves of a head's rotated channels."""
    R = x1_R.size
    for i in range(R):
        out_2R[i] = x2_R[i] if pre_negated else -x2_R[i]
        out_2R[R + i] = x1_R[i]


@definition
def rounded_head(x_K, norm, rope, pre_negated, grids, H, out_K):
    """One head, normed and rotated. norm: a Norm. rope: a Rope.

    Shapes: x, out [K]; grids [SITES * H, GRID_WORDS] from the head's own first row.
    """
    kept_apart()  # the kernel needs it for queries and for keys
    cos_2R, sin_2R = rope
    K, R2 = x_K.size, cos_2R.size
    for i in range(K):
        out_K[i] = x_K[i]
    if norm.weight_K.size > 0:
        row = out_K.reshape(1, K)
        rms_norm(row, norm.weight_K, norm.eps, norm.offset, row)
    quantize_row(out_K, grids[NORM * H])
    if R2 > 0:
        cat_2R, cos_product_2R, sin_product_2R = np.empty_like(sin_2R), np.empty_like(cos_2R), np.empty_like(sin_2R)
        x1_R, x2_R = out_K[: R2 // 2].copy(), out_K[R2 // 2 : R2].copy()
        quantize_row(x1_R, grids[X1 * H])
        quantize_row(x2_R, grids[X2 * H])
        swapped_halves(x1_R, x2_R, pre_negated, cat_2R)
        quantize_row(cat_2R, grids[CAT * H])
        for i in range(R2):
            cos_product_2R[i], sin_product_2R[i] = out_K[i] * cos_2R[i], cat_2R[i] * sin_2R[i]
        quantize_row(cos_product_2R, grids[COS * H])
        quantize_row(sin_product_2R, grids[SIN * H])
        for i in range(R2):
            out_K[i] = cos_product_2R[i] + sin_product_2R[i]
    quantize_row(out_K, grids[ROT * H])


@inlined
def grids_from(address, head, num_rows):
    """The rows of grids at an address, from a head's first row on."""
    return carray(float_array(address + 4 * GRID_WORDS * head), (num_rows - head, GRID_WORDS))


@inlined
def rope_of(a, position):
    """The Rope of a position."""
    R = a.rope_dim // 2
    grids = carray(float_array(a.rope_grids), (2, GRID_WORDS))
    cos_2R, sin_2R = np.empty(2 * R, np.float32), np.empty(2 * R, np.float32)
    doubled(carray(float_array(a.cos + 4 * R * position), (R,)), False, cos_2R)
    doubled(carray(float_array(a.sin + 4 * R * position), (R,)), a.pre_negated, sin_2R)
    quantize_row(cos_2R, grids[0])
    quantize_row(sin_2R, grids[1])
    return Rope(cos_2R, sin_2R)


@inlined
def write_token(a, batch, t):
    """Writes a token's query heads to q, its keys and values to their page."""
    H, G, K, row = a.num_heads, a.num_kv_heads, a.head_dim, a.x + 4 * a.row_width * t
    position, out_K = entry(batch.position, t), np.empty(K, np.float32)
    rope = rope_of(a, position)
    q_norm = Norm(carray(float_array(a.q_norm), (K if a.q_norm != 0 else 0,)), a.eps, a.norm_offset)
    k_norm = Norm(carray(float_array(a.k_norm), (K if a.k_norm != 0 else 0,)), a.eps, a.norm_offset)
    for h in range(H):
        x_K = carray(float_array(row + 4 * (a.q_offset + h * a.q_stride)), (K,))
        q_K, grids = carray(float_array(a.q + 4 * K * (t * H + h)), (K,)), grids_from(a.q_grids, h, Q_SITES * H)
        rounded_head(x_K, q_norm, rope, a.pre_negated, grids, H, q_K)
    for g in range(G):
        page = entry(pages_of(batch, entry(batch.request, t), a.page_group), position // PAGE_TOKENS)
        x_K, grids = carray(float_array(row + 4 * (a.k_offset + g * K)), (K,)), grids_from(a.k_grids, g, K_SITES * G)
        rounded_head(x_K, k_norm, rope, a.pre_negated, grids, G, out_K)
        quantize_row(out_K, grids[ALL * G])
        for d in range(K):
            write_number(a.k_pages, k_index(page, g, d, position % PAGE_TOKENS, G, K, False), out_K[d], False)
        v_K = carray(float_array(row + 4 * (a.v_offset + g * K)), (K,))
        for d in range(K):
            out_K[d] = v_K[d]
        quantize_row(out_K, grids_from(a.v_grids, g, G)[0])
        for d in range(K):
            write_number(a.v_pages, v_index(page, g, d, position % PAGE_TOKENS, G, K, False), out_K[d], False)


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, batch = RoundedInputs.read(op), StepBlock.read(step)
        for t in range(num_rows(op, step)):
            write_token(a, batch, t)


REFERENCE = {"rounded_inputs": Implementation(_run)}
