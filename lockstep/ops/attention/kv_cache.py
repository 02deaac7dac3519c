"""The KV cache: the definitions of its layout and of the op that prepares queries, keys and values for attention.

A page holds PAGE_TOKENS consecutive positions of one request, which is also one block of keys in attention. Position p
of request s lives in page `pages_of(request)[p // 64]` of the layer's group, slot `p % 64`:

              f32           bf16                 q8
    K page    [G, K, 64]    [G, K / 2, 64, 2]    [G, (K / 4, 64, 4) and scales]    lanes of q . k are keys
    V page    [G, 64, K]    [G, 32, K, 2]        [G, (16, K, 4) and scales]        lanes of p . v are dimensions

In float32 a row holds one dimension of 64 keys, or all dimensions of one value. In bfloat16 two and in q8 four
dimensions (or values) that are neighbours in a sum are interleaved, as the instructions for pairs and fours want them.
A bfloat16 is the upper half of a float32, rounded to nearest even when it is written; q8 is described in `kv_cache_q8`.
Attention reads K and V from these pages only, so a token sees the same numbers whether they were written in this step
or long ago.
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray, float32
from lockstep.native.simd import bf16_bits, peek, peek_bf16, poke, round_bf16
from lockstep.ops.attention.formulas import MAX_HEAD_DIM
from lockstep.ops.attention.rope import rotate
from lockstep.ops.elementwise.rms_norm import rms_norm
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, cache, constant, output, rows, table
from lockstep.runtime.program import CacheArray, Table, Tensor, Weight
from lockstep.runtime.step import StepBlock, entry, num_rows, pages_of

PAGE_TOKENS = 64
KV_DTYPES = ("f32", "bf16", "q8")  # types of a cache
ELEMENTS = {"f32": "f32", "bf16": "bf16", "q8": "i8"}  # the dtype of a page's elements
SCALE_BYTES = 2  # of a q8 key or value of one head: a bfloat16


def page_shapes(G, K, kv_dtype):
    """Shapes of a page of K and of a page of V, in elements."""
    if kv_dtype == "q8":
        return ((G, PAGE_TOKENS * (K + SCALE_BYTES)),) * 2
    if kv_dtype == "bf16":
        return (G, K // 2, PAGE_TOKENS, 2), (G, PAGE_TOKENS // 2, K, 2)
    return (G, K, PAGE_TOKENS), (G, PAGE_TOKENS, K)


def kv_dtype_of(pages: CacheArray) -> str:
    """The type of a cache, one of KV_DTYPES."""
    return next(kv_dtype for kv_dtype, element in ELEMENTS.items() if element == pages.dtype)


def check_pages(op: Operands) -> None:
    """ValueError if an op's k_pages and v_pages do not fit its kv heads and its page group, or are not of one type."""
    check_group(op, op.k_pages, op.v_pages)
    if op.k_pages.dtype not in ELEMENTS.values():
        raise ValueError(f"{type(op).__name__}: pages of {op.k_pages.dtype}, expected {', '.join(ELEMENTS.values())}")
    shapes = page_shapes(op.num_kv_heads, op.head_dim, kv_dtype_of(op.k_pages))
    for pages, shape in zip((op.k_pages, op.v_pages), shapes, strict=True):
        if (pages.dtype, tuple(pages.shape)) != (op.k_pages.dtype, shape):
            raise ValueError(
                f"{type(op).__name__}: a page of {pages.name} is {pages.dtype} {tuple(pages.shape)}, expected "
                f"{op.k_pages.dtype} {shape}"
            )


def check_group(op: Operands, *caches: CacheArray) -> None:
    """ValueError if an op's page_group, whose page table the op reads, is not the group of its caches."""
    for pages in caches:
        if op.page_group != pages.group:
            raise ValueError(
                f"{type(op).__name__}: page_group is {op.page_group}, expected {pages.group} as of {pages.name}"
            )


class AttentionInputs(Operands):
    """q = rope(norm(heads of x)); the keys of x, normed and rotated likewise, and the values of x go to their pages.

    See `token_inputs`. Without q_norm and k_norm heads are not normed; rope_dim 0: they are not rotated. Head h of q
    begins at column q_offset + h * q_stride of x, of k at k_offset + h * head_dim, of v at v_offset + h * head_dim.
    norms_values: the heads of v are normed, too, without a weight. whole_norms: queries are normed as one row of all
    heads, and so are keys; the weights are as wide. bf16: whether the pages are bfloat16, page_group: their group; both
    are checked against the pages. q_cos, q_sin: the tables of queries, where they are not those of keys: a factor by
    position of the queries is a factor of their tables, which is exact but for the one rounding of a table's number,
    and costs nothing; all channels must rotate.
    """

    group = "attention"
    rules = (
        "num_heads % num_kv_heads == 0",
        "head_dim % 16 == 0",
        f"head_dim <= {MAX_HEAD_DIM}",
        "rope_dim % 2 == 0",
        "rope_dim <= head_dim",
        "eps >= 0",
        "q_stride == head_dim or not whole_norms",
    )
    q: Tensor = output("num_heads * head_dim")
    x: Tensor = rows("row_width")
    cos: Table = table()
    sin: Table = table()
    k_pages: CacheArray = cache(kind="pages")
    v_pages: CacheArray = cache(kind="pages")
    q_norm: Weight | None = constant("num_heads ** whole_norms * head_dim", optional=True)
    k_norm: Weight | None = constant("num_kv_heads ** whole_norms * head_dim", optional=True)
    q_cos: Table | None = table(optional=True)
    q_sin: Table | None = table(optional=True)
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
    bf16: bool
    page_group: int = 0
    norms_values: bool = False
    whole_norms: bool = False

    def check(self):
        check_pages(self)
        if (self.kv_dtype == "bf16") != self.bf16:
            raise ValueError(f"AttentionInputs: bf16 is {self.bf16}, the pages are {self.kv_dtype}")
        if (self.q_norm is None) != (self.k_norm is None):
            raise ValueError("AttentionInputs: there is only one of q_norm and k_norm, expected both or none")
        self._check_tables("cos", self.cos, "sin", self.sin)
        if (self.q_cos is None) != (self.q_sin is None):
            raise ValueError("AttentionInputs: there is only one of q_cos and q_sin, expected both or none")
        if self.q_cos and self.q_sin:
            self._check_tables("q_cos", self.q_cos, "q_sin", self.q_sin)
            if self.rope_dim != self.head_dim:
                raise ValueError(f"AttentionInputs: q_cos with rope_dim {self.rope_dim}, expected {self.head_dim}")
        heads = dict(q=self.q_offset + (self.num_heads - 1) * self.q_stride, k=self.k_offset, v=self.v_offset)
        for name, last in heads.items():
            end = last + self.head_dim * (1 if name == "q" else self.num_kv_heads)
            if end > self.row_width:
                raise ValueError(f"AttentionInputs: {name} ends at column {end} of x, which has {self.row_width}")

    def _check_tables(self, cos_name: str, cos: Table, sin_name: str, sin: Table) -> None:
        widths, expected = (cos.rows.shape[1], sin.rows.shape[1]), self.rope_dim // 2
        if self.rope_dim and widths != (expected,) * 2:
            raise ValueError(f"AttentionInputs: {cos_name} and {sin_name} are {widths} wide, expected {expected} both")

    @property
    def kv_dtype(self):
        """The type of the cache, one of KV_DTYPES."""
        return kv_dtype_of(self.k_pages)

    @property
    def kind(self):
        return "attention_inputs_q8" if self.kv_dtype == "q8" else "attention_inputs"

    def flops(self, context):
        return (self.num_heads + self.num_kv_heads) * (
            3 * self.rope_dim + 5 * self.head_dim * (self.q_norm is not None)
        )


class AttentionQueries(Operands):
    """q = rope(norm(heads of x)), for a layer that reads the keys and values of another one; as in AttentionInputs."""

    group = "attention"
    rules = (
        "head_dim % 16 == 0",
        f"head_dim <= {MAX_HEAD_DIM}",
        "rope_dim % 2 == 0",
        "rope_dim <= head_dim",
        "eps >= 0",
        "num_heads * head_dim <= row_width",
    )
    q: Tensor = output("num_heads * head_dim")
    x: Tensor = rows("row_width")
    cos: Table = table()
    sin: Table = table()
    q_norm: Weight | None = constant("head_dim", optional=True)
    num_heads: int
    head_dim: int
    rope_dim: int
    row_width: int
    eps: float
    norm_offset: float

    def check(self):
        widths = self.cos.rows.shape[1], self.sin.rows.shape[1]
        if self.rope_dim and widths != (self.rope_dim // 2,) * 2:
            raise ValueError(f"AttentionQueries: cos and sin are {widths} wide, expected {self.rope_dim // 2} both")

    def flops(self, context):
        return self.num_heads * (3 * self.rope_dim + 5 * self.head_dim * (self.q_norm is not None))


def by_position(pages, is_keys):
    """Pages [N, *page shape, bytes] in the order of positions: [64 N, G, K, bytes].

    For q8 pages [64 N, G, K + 2, 1]: the codes, then the scale.
    """
    if pages.ndim == 4:
        return _q8_by_position(pages[..., 0], is_keys)[..., None]
    if pages.ndim == 6:
        ordered = pages.transpose((0, 3, 1, 2, 4, 5) if is_keys else (0, 2, 4, 1, 3, 5))
    else:
        ordered = pages.transpose((0, 3, 1, 2, 4) if is_keys else (0, 2, 1, 3, 4))
    G, K = (pages.shape[1], pages.shape[2] * (pages.ndim - 4)) if is_keys else (pages.shape[1], pages.shape[3])
    return ordered.reshape(-1, G, K, pages.shape[-1])


def _q8_by_position(pages, is_keys):
    """Bytes of q8 pages [N, G, 64 (K + 2)] in the order of positions: [64 N, G, K + 2]."""
    N, G, size = pages.shape
    K = size // PAGE_TOKENS - SCALE_BYTES
    codes, scales = pages[..., : PAGE_TOKENS * K], pages[..., PAGE_TOKENS * K :].reshape(N, G, PAGE_TOKENS, SCALE_BYTES)
    fours = codes.reshape(N, G, -1, PAGE_TOKENS if is_keys else K, 4)
    ordered = fours.transpose((0, 3, 1, 2, 4) if is_keys else (0, 2, 4, 1, 3)).reshape(-1, G, K)
    return np.concatenate([ordered, scales.swapaxes(1, 2).reshape(-1, G, SCALE_BYTES)], axis=-1)


@inlined
def write_number(array, index, x, bf16):
    """Stores one number in a cache array, rounded to the array's type."""
    if bf16:
        poke(array + 2 * index, bf16_bits(round_bf16(x)))
    else:
        poke(array + 4 * index, x)


@inlined
def read_number(array, index, bf16):
    """One number of a cache array, as float32."""
    return peek_bf16(array + 2 * index) if bf16 else peek(array + 4 * index, float32)


@inlined
def k_index(page, g, d, slot, G, K, bf16):
    """The index of dimension d of a slot's key in the array of K pages."""
    head = (page * G + g) * K * PAGE_TOKENS
    return head + (d // 2 * PAGE_TOKENS + slot) * 2 + d % 2 if bf16 else head + d * PAGE_TOKENS + slot


@inlined
def v_index(page, g, d, slot, G, K, bf16):
    """The index of dimension d of a slot's value in the array of V pages."""
    head = (page * G + g) * PAGE_TOKENS * K
    return head + (slot // 2 * K + d) * 2 + slot % 2 if bf16 else head + slot * K + d


@definition
def heads_of(row_W, offset, stride, num_heads, head_dim):
    """Copies the heads of a row of a projection: head h starts at column offset + h * stride."""
    x_HK = np.empty((num_heads, head_dim), np.float32)
    for h in range(num_heads):
        for d in range(head_dim):
            x_HK[h, d] = row_W[offset + h * stride + d]
    return x_HK


@definition
def prepared(x_HK, norm_N, eps, norm_offset, cos_R, sin_R):
    """Norms heads by `rms_norm`, whose rows are as wide as the norm's weight: a head, or all heads (or not at all if it
    is empty); then rotates each head by `rotate`."""
    out_HK = np.empty(x_HK.shape, np.float32)
    if norm_N.size > 0:
        rows = x_HK.reshape((x_HK.size // norm_N.size, norm_N.size))
        rms_norm(rows, norm_N, eps, norm_offset, rows)
    for h in range(x_HK.shape[0]):
        rotate(x_HK[h], cos_R, sin_R, out_HK[h])
    return out_HK


@inlined
def token_inputs(a, batch, t):
    """Writes a token's query heads, normed and rotated, to q; returns its keys, normed and rotated, its values, and the
    page and slot of its position.

    Order: `rms_norm` of the head or of all heads, then `rotate`. Values that are normed: `rms_norm` with weights of 1.
    """
    H, G, K, R = a.num_heads, a.num_kv_heads, a.head_dim, a.rope_dim // 2
    q_norm_N = carray(float_array(a.q_norm), ((H * K if a.whole_norms else K) if a.q_norm != 0 else 0,))
    k_norm_N = carray(float_array(a.k_norm), ((G * K if a.whole_norms else K) if a.k_norm != 0 else 0,))
    position, table = entry(batch.position, t), pages_of(batch, entry(batch.request, t), a.page_group)
    row_W = carray(float_array(a.x + 4 * a.row_width * t), (a.row_width,))
    cos_R = carray(float_array(a.cos + 4 * R * position), (R,))
    sin_R = carray(float_array(a.sin + 4 * R * position), (R,))
    q_cos_R = carray(float_array((a.q_cos if a.q_cos != 0 else a.cos) + 4 * R * position), (R,))
    q_sin_R = carray(float_array((a.q_sin if a.q_sin != 0 else a.sin) + 4 * R * position), (R,))
    q_HK = prepared(heads_of(row_W, a.q_offset, a.q_stride, H, K), q_norm_N, a.eps, a.norm_offset, q_cos_R, q_sin_R)
    k_GK = prepared(heads_of(row_W, a.k_offset, K, G, K), k_norm_N, a.eps, a.norm_offset, cos_R, sin_R)
    for h in range(H):
        for d in range(K):
            poke(a.q + 4 * ((t * H + h) * K + d), q_HK[h, d])
    page, v_GK = entry(table, position // PAGE_TOKENS), heads_of(row_W, a.v_offset, K, G, K)
    if a.norms_values:
        rms_norm(v_GK, np.ones(K, np.float32), a.eps, np.float32(0), v_GK)
    return k_GK, v_GK, page, position % PAGE_TOKENS


@kernel
def _run(op, step, thread, num_threads):
    """For every token: its query heads go to q, its keys and values to the cache, rounded to the cache's type."""
    if thread == 0:
        a, batch = AttentionInputs.read(op), StepBlock.read(step)
        G, K = a.num_kv_heads, a.head_dim
        for t in range(num_rows(op, step)):
            k_GK, v_GK, page, slot = token_inputs(a, batch, t)
            for g in range(G):
                for d in range(K):
                    write_number(a.k_pages, k_index(page, g, d, slot, G, K, a.bf16), k_GK[g, d], a.bf16)
                    write_number(a.v_pages, v_index(page, g, d, slot, G, K, a.bf16), v_GK[g, d], a.bf16)


@kernel
def _queries(op, step, thread, num_threads):
    """For every token: its query heads, normed and rotated, go to q."""
    a, batch = AttentionQueries.read(op), StepBlock.read(step)
    H, K, R = a.num_heads, a.head_dim, a.rope_dim // 2
    norm_K = carray(float_array(a.q_norm), (K if a.q_norm != 0 else 0,))
    for t in range(num_rows(op, step) if thread == 0 else 0):
        position = entry(batch.position, t)
        row_W = carray(float_array(a.x + 4 * a.row_width * t), (a.row_width,))
        cos_R = carray(float_array(a.cos + 4 * R * position), (R,))
        sin_R = carray(float_array(a.sin + 4 * R * position), (R,))
        q_HK = prepared(heads_of(row_W, 0, K, H, K), norm_K, a.eps, a.norm_offset, cos_R, sin_R)
        for h in range(H):
            for d in range(K):
                poke(a.q + 4 * ((t * H + h) * K + d), q_HK[h, d])


REFERENCE = {"attention_inputs": Implementation(_run), "attention_queries": Implementation(_queries)}
