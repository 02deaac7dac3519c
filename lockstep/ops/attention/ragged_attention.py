"""Attention of a ragged batch over pages of any size: the definition.

Sequence s has kv_lens[s] tokens, the last of which are rows cu_q_lens[s] .. cu_q_lens[s + 1] - 1 of q. Its position p
lies in slot p % B of page page_indices[s, p // B]. Each row is `attention.attend`, so that its bits are those of the
engine's attention over a float32 cache, whatever the type and size of the pages, the chunk and the rest of the batch.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import definition
from lockstep.ops.attention.attention import attend, finished
from lockstep.ops.attention.formulas import ZERO, first_key
from lockstep.runtime.operands import Operands, cache, constant, output, rows, table


class Sequences(NamedTuple):
    """Which rows and pages belong to which sequence. int32: kv_lens [S], page_indices [S, P], cu_q_lens [S + 1],
    num_seqs [1]."""

    kv_lens: np.ndarray
    page_indices: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray


class Scoring(NamedTuple):
    """How keys are weighed. scale, cap: as `score_scales` gives them; v_scale: a factor of the result; window: how many
    keys a row sees at most, 0 for all up to its own position; sinks: float32 [H], or [0] for none."""

    scale: np.float32
    cap: np.float32
    v_scale: np.float32
    window: int
    sinks: np.ndarray


class RaggedAttention(Operands):
    """`attend_ragged` over arrays anywhere in memory. The op is part of no program: `ragged.Workers` writes its op row.

    Strides are in bytes: out_token leads from one token of out to the next, k_slot from one slot of a page to the next,
    table_row from one sequence's page indices to the next. unit_heads: query heads that share one read of a kv head.
    states: memory for the sums of tiles between their spans.
    """

    out: np.ndarray = output()
    states: np.ndarray = output(scratch=True)
    q: np.ndarray = rows()
    k: np.ndarray = cache()
    v: np.ndarray = cache()
    kv_lens: np.ndarray = table()
    page_indices: np.ndarray = table()
    cu_q_lens: np.ndarray = table()
    num_seqs: np.ndarray = table()
    sinks: np.ndarray | None = constant(optional=True)
    out_token: int
    out_head: int
    q_token: int
    q_head: int
    k_page: int
    k_slot: int
    k_head: int
    v_page: int
    v_slot: int
    v_head: int
    table_row: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    unit_heads: int
    window: int
    q_bf16: bool
    scale: float
    cap: float
    v_scale: float


@definition
def gathered(pages_NBGK, page_indices_P, g, first, stop):
    """Keys (or values) of one kv head at positions first .. stop - 1, in an array [stop, K]; nothing else is read."""
    page_size, head_dim = pages_NBGK.shape[1], pages_NBGK.shape[3]
    rows_CK = np.zeros((stop, head_dim), np.float32)
    for position in range(first, stop):
        page = page_indices_P[position // page_size]
        for d in range(head_dim):
            rows_CK[position, d] = pages_NBGK[page, position % page_size, g, d]
    return rows_CK


@definition
def attend_ragged(q_THK, k_NBGK, v_NBGK, sequences, scoring, out_THK):
    """out[t, h] = softmax(soft_cap(scale * q[t, h] . k)) v over the keys that row t sees; other rows are 0.

    Shapes: all float32, Sequences and Scoring aside; K dimensions, pages of B slots.
    Error: 2e-6 of the float64 result for scores below 20 and |v| < 4, up to 2048 keys.
    Order: `attention.attend`, then `attention.finished`.
    Source: the arguments are those of JAX's Pallas kernel of the same name.
    """
    H, G = q_THK.shape[1], k_NBGK.shape[2]
    scales, window = (scoring.scale, scoring.cap), scoring.window
    for t in range(q_THK.shape[0]):
        for h in range(H):
            for d in range(q_THK.shape[2]):
                out_THK[t, h, d] = ZERO
    for s in range(sequences.num_seqs[0]):
        start, stop, length = sequences.cu_q_lens[s], sequences.cu_q_lens[s + 1], sequences.kv_lens[s]
        if start == stop:
            continue
        first = first_key(length - (stop - start), window)
        for g in range(G):
            k_CK = gathered(k_NBGK, sequences.page_indices[s], g, first, length)
            v_CK = gathered(v_NBGK, sequences.page_indices[s], g, first, length)
            for t in range(start, stop):
                for h in range(g * (H // G), (g + 1) * (H // G)):
                    position, out_K = length - (stop - t), out_THK[t, h]
                    top, total = attend(q_THK[t, h], k_CK, v_CK, position, window, scales, out_K)
                    finished(out_K, top, total, scoring.sinks[h : h + 1], scoring.v_scale)
