"""Attention of one head in small steps: the definition.

`rounded_attention` taken apart, an op for each intermediate that hardware keeps; see `ptq.unroll`. A row of scores has
a column for each key of the token's sequence by position, of which the first `row_keys` are used; the others are not
read. A row of a token with more keys than columns is NaN.
"""

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.simd import poke
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, check_group, k_index, page_shapes, v_index, write_number
from lockstep.ops.rounded.attention import cached, check_whole, mask_added, row_keys, scores_of, softmax, values_of
from lockstep.ops.rounded.unrolled_rows import row_of
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, cache, output, rows
from lockstep.runtime.program import CacheArray, Tensor
from lockstep.runtime.step import StepBlock, entry, num_rows, pages_of

UNKNOWN = np.float32(np.nan)
HEAD_RULES = ("kv_head < num_kv_heads", "head_dim % 16 == 0")
SCORE_RULES = ("width % 16 == 0",)


class KeepHead(Operands):
    """Writes each token's key and value of one kv head to their pages."""

    group = "attention"
    rules = HEAD_RULES
    k: Tensor = rows("head_dim")
    v: Tensor = rows("head_dim")
    k_pages: CacheArray = cache(kind="pages", dtype="f32")
    v_pages: CacheArray = cache(kind="pages", dtype="f32")
    num_kv_heads: int
    head_dim: int
    kv_head: int
    page_group: int = 0

    def check(self):
        for pages, index in ((self.k_pages, 0), (self.v_pages, 1)):
            check_page(self, pages, index)


class HeadScores(Operands):
    """out[j] = q . key j of a kv head, for every key of a row. additive: see `row_keys`."""

    group = "attention"
    rules = (*HEAD_RULES, *SCORE_RULES)
    out: Tensor = output("width")
    q: Tensor = rows("head_dim")
    k_pages: CacheArray = cache(kind="pages", dtype="f32")
    num_kv_heads: int
    head_dim: int
    kv_head: int
    width: int
    additive: bool
    page_group: int = 0

    def check(self):
        check_page(self, self.k_pages, 0)
        check_whole(self, self.k_pages)

    def flops(self, context):
        return 2 * self.head_dim * context


class ScaleRows(Operands):
    """out = x * factor, for the keys of a row of scores."""

    group = "attention"
    rules = SCORE_RULES
    out: Tensor = output("width")
    x: Tensor = rows("width")
    width: int
    factor: float
    additive: bool

    def flops(self, context):
        return context


class MaskRows(Operands):
    """out = x + fill for keys after the token's own, x + 0 for the others, of all keys of its sequence."""

    group = "attention"
    rules = (*SCORE_RULES, "additive")
    out: Tensor = output("width")
    x: Tensor = rows("width")
    width: int
    fill: float
    additive: bool = True

    def flops(self, context):
        return context


class SoftmaxRows(Operands):
    """out = e**x / sum of e**x over the keys of a row."""

    group = "attention"
    rules = SCORE_RULES
    out: Tensor = output("width")
    x: Tensor = rows("width")
    width: int
    additive: bool

    def flops(self, context):
        return 4 * context


class HeadValues(Operands):
    """out = sum over the keys of a row of p[j] * value j of a kv head."""

    group = "attention"
    rules = (*HEAD_RULES, *SCORE_RULES)
    out: Tensor = output("head_dim")
    p: Tensor = rows("width")
    v_pages: CacheArray = cache(kind="pages", dtype="f32")
    num_kv_heads: int
    head_dim: int
    kv_head: int
    width: int
    additive: bool
    page_group: int = 0

    def check(self):
        check_page(self, self.v_pages, 1)
        check_whole(self, self.v_pages)

    def flops(self, context):
        return 2 * self.head_dim * context


def check_page(op, pages, index):
    """ValueError unless a cache has pages of an op's group and kv heads, for keys (index 0) or values (1)."""
    check_group(op, pages)
    expected = page_shapes(op.num_kv_heads, op.head_dim, "f32")[index]
    if tuple(pages.shape) != expected:
        raise ValueError(
            f"{type(op).__name__}: a page of {pages.name} is {tuple(pages.shape)}, expected {expected}, of "
            f"{op.num_kv_heads} kv heads of {op.head_dim}"
        )


@inlined
def keys_in_row(a, batch, t):
    """The number of keys of a row for which there are columns."""
    return min(row_keys(a, batch, t), a.width)


@inlined
def scores_at(a, array, batch, t):
    """The scores of row t of a tensor at an address, [keys]."""
    return row_of(array, a.width, t, 0, keys_in_row(a, batch, t))


@kernel
def _keep_head(op, step, thread, num_threads):
    a, batch = KeepHead.read(op), StepBlock.read(step)
    G, K = a.num_kv_heads, a.head_dim
    for t in range(num_rows(op, step) if thread == 0 else 0):
        position = entry(batch.position, t)
        page = entry(pages_of(batch, entry(batch.request, t), a.page_group), position // PAGE_TOKENS)
        k_K, v_K, slot = row_of(a.k, K, t, 0, K), row_of(a.v, K, t, 0, K), position % PAGE_TOKENS
        for d in range(K):
            write_number(a.k_pages, k_index(page, a.kv_head, d, slot, G, K, False), k_K[d], False)
            write_number(a.v_pages, v_index(page, a.kv_head, d, slot, G, K, False), v_K[d], False)


@kernel
def _head_scores(op, step, thread, num_threads):
    a, batch = HeadScores.read(op), StepBlock.read(step)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        table, num_keys = pages_of(batch, entry(batch.request, t), a.page_group), keys_in_row(a, batch, t)
        k_CK = cached(a.k_pages, k_index, table, a.kv_head, num_keys, a.num_kv_heads, a.head_dim)
        scores_of(row_of(a.q, a.head_dim, t, 0, a.head_dim), k_CK, scores_at(a, a.out, batch, t))
        if num_keys < row_keys(a, batch, t):
            poke(a.out + 4 * a.width * t, UNKNOWN)


@kernel
def _scale_rows(op, step, thread, num_threads):
    a, batch = ScaleRows.read(op), StepBlock.read(step)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        x_C, out_C = scores_at(a, a.x, batch, t), scores_at(a, a.out, batch, t)
        for j in range(out_C.size):
            out_C[j] = x_C[j] * a.factor


@kernel
def _mask_rows(op, step, thread, num_threads):
    a, batch = MaskRows.read(op), StepBlock.read(step)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        out_C = scores_at(a, a.out, batch, t)
        out_C[:] = scores_at(a, a.x, batch, t)
        mask_added(out_C, entry(batch.position, t), a.fill)


@kernel
def _softmax_rows(op, step, thread, num_threads):
    a, batch = SoftmaxRows.read(op), StepBlock.read(step)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        out_C = scores_at(a, a.out, batch, t)
        out_C[:] = scores_at(a, a.x, batch, t)
        softmax(out_C)


@kernel
def _head_values(op, step, thread, num_threads):
    a, batch = HeadValues.read(op), StepBlock.read(step)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        table, num_keys = pages_of(batch, entry(batch.request, t), a.page_group), keys_in_row(a, batch, t)
        v_CK = cached(a.v_pages, v_index, table, a.kv_head, num_keys, a.num_kv_heads, a.head_dim)
        values_of(scores_at(a, a.p, batch, t), v_CK, row_of(a.out, a.head_dim, t, 0, a.head_dim))


REFERENCE = {
    "keep_head": Implementation(_keep_head),
    "head_scores": Implementation(_head_scores),
    "scale_rows": Implementation(_scale_rows),
    "mask_rows": Implementation(_mask_rows),
    "softmax_rows": Implementation(_softmax_rows),
    "head_values": Implementation(_head_values),
}
