"""Batches for ragged paged attention: scattered pages, NaN in every unused slot, garbage in unused entries of tables.

The numbers are made of seven raw random bits each, so that bfloat16 holds them exactly and no library's version changes
them: recorded results need no recorded inputs. Imports nothing of Lockstep: the recorder of results runs beside JAX.
"""

from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
E4M3, E5M2, I8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2), np.dtype(np.int8)
MIXED = [1, 5, 0, 70, 1], [70, 5, 10, 200, 130]  # new tokens and tokens in all, of each sequence
GARBAGE = [2**31 - 1, -7, -(2**31)]


def numbers(shape, seed):
    """Multiples of 1/32 from -2 to 2 - 1/32, as float32."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(57)).astype(np.float32) / np.float32(32) - np.float32(2)).reshape(shape)


@dataclass(frozen=True)
class Batch:
    """The sequences and options of one call. Every number is exact in its dtype. pages_dtype: the dtype of K and V, if
    it is not that of q."""

    lengths: list
    contexts: list
    heads: tuple = (4, 2, 32)  # H, G, K
    page_size: int = 16
    dtype: np.dtype = F32
    seed: int = 0
    padding_rows: int = 3
    options: dict = field(default_factory=dict)
    pages_dtype: np.dtype | None = None

    @property
    def q(self):
        H, _, K = self.heads
        return numbers((sum(self.lengths) + self.padding_rows, H, K), self.seed).astype(self.dtype)

    def kv(self, s):
        """(keys, values) [C, G, K] of a sequence."""
        _, G, K = self.heads
        both = numbers((self.contexts[s], 2, G, K), 1000 * self.seed + s + 1)
        if self.pages_dtype is not None:
            both = (32 * both if self.pages_dtype == I8 else both).astype(self.pages_dtype).astype(np.float32)
        return both[:, 0], both[:, 1]

    def table(self):
        """(page_indices with a spare row and column of garbage, number of pages)."""
        num_pages = [-(-c // self.page_size) for c in self.contexts]
        order = np.random.PCG64(self.seed).random_raw(sum(num_pages) + 2).argsort(kind="stable")
        table = np.resize(np.array(GARBAGE, np.int32), (len(num_pages) + 1, max(num_pages, default=0) + 1))
        for s, num in enumerate(num_pages):
            table[s, :num] = order[sum(num_pages[:s]) : sum(num_pages[: s + 1])]
        return table, len(order)

    def pages(self):
        """kv_pages [N, B, 2 G, K], keys and values interleaved."""
        (table, N), (_, G, K) = self.table(), self.heads
        dtype = self.pages_dtype or self.dtype
        pages = np.full((N, self.page_size, 2 * G, K), 127 if dtype == I8 else np.nan, dtype)
        for s, context in enumerate(self.contexts):
            page, slot = table[s, np.arange(context) // self.page_size], np.arange(context) % self.page_size
            pages[page, slot, 0::2], pages[page, slot, 1::2] = self.kv(s)
        return pages

    def arguments(self):
        """The six arrays, in the order of JAX's kernel."""
        starts = np.concatenate([[0], np.cumsum(self.lengths), GARBAGE[1:2]]).astype(np.int32)
        return (
            self.q,
            self.pages(),
            np.array([*self.contexts, GARBAGE[0]], np.int32),
            self.table()[0],
            starts,
            np.array([len(self.lengths)], np.int32),
        )

    def exact(self):
        """The result in float64, without blocks, and zeros in the padding rows."""
        (H, G, K), options, rows = self.heads, self.options, []
        q_TGJK = self.q.astype(np.float64).reshape(-1, G, H // G, K)
        for s, (length, context) in enumerate(zip(self.lengths, self.contexts, strict=True)):
            keys, values = (x.astype(np.float64) for x in self.kv(s))
            for position in range(context - length, context):
                seen = slice(max(0, position + 1 - (options.get("sliding_window") or context)), position + 1)
                score = np.einsum("gjk,cgk->gjc", q_TGJK[len(rows)], keys[seen]) * options.get("sm_scale", 1.0)
                score = score * (options.get("k_scale") or 1)
                if cap := options.get("soft_cap"):
                    score = cap * np.tanh(score / cap)
                sink = options.get("sinks", np.full(H, -np.inf)).astype(np.float64).reshape(G, H // G, 1)
                top = np.maximum(score.max(-1, keepdims=True), sink)
                weight = np.exp(score - top)
                share = weight / (weight.sum(-1, keepdims=True) + np.exp(sink - top))
                out_GJK = np.einsum("gjc,cgk->gjk", share, values[seen]) * (options.get("v_scale") or 1)
                rows.append(out_GJK.reshape(H, K))
        return np.array(rows + [np.zeros((H, K))] * self.padding_rows).reshape(-1, H, K)

    def alone(self, s):
        """The sequence in a batch of its own, on the same numbers: (arguments, its rows in the whole batch)."""
        q, pages, kv_lens, table, starts, _ = self.arguments()
        rows = slice(starts[s], starts[s + 1])
        return (
            q[rows],
            pages,
            kv_lens[s : s + 1],
            table[s : s + 1],
            np.array([0, self.lengths[s]], np.int32),
            np.array([1], np.int32),
        ), rows

    def with_pages_of(self, page_size):
        return replace(self, page_size=page_size)


RECORDED = {
    "decode": Batch([1, 1, 1], [18, 129, 64], (8, 2, 64), options=dict(sm_scale=0.125)),
    "mixed": Batch([5, 1, 20], [18, 129, 31], (4, 4, 64), seed=1, options=dict(sm_scale=0.125)),
    "window and cap": Batch(
        [7, 30, 1], [40, 30, 80], (4, 1, 64), 5, seed=2, options=dict(sm_scale=0.2, sliding_window=9, soft_cap=3.0)
    ),
    "scales": Batch([3, 1], [60, 20], (4, 2, 128), 32, seed=3, options=dict(sm_scale=0.1, k_scale=0.5, v_scale=1.5)),
    "one to a page": Batch([4, 9], [6, 30], (4, 2, 80), 1, seed=4),
    "bf16": Batch([6, 1, 12], [33, 200, 12], (4, 1, 128), 16, BF16, 5, options=dict(sm_scale=0.09)),
    "bf16, 16 query heads": Batch(
        [1, 8], [90, 10], (16, 1, 64), 64, BF16, 6, options=dict(sm_scale=0.125, soft_cap=20.0)
    ),
}
