"""Ragged paged attention on NumPy arrays: prefill and decode in one call, over a paged cache.

from lockstep.ops import ragged_paged_attention
"""

import os
import threading
from functools import cache

import ml_dtypes
import numpy as np

from lockstep.native.kernel import interpreted
from lockstep.ops.attention import ragged_checks as checks
from lockstep.ops.attention.formulas import score_scales
from lockstep.ops.attention.ragged_attention import RaggedAttention, Scoring, Sequences, attend_ragged
from lockstep.ops.attention.ragged_attention_cpu import KERNELS
from lockstep.ops.attention.work import STATE_BYTES, TILES_PER_THREAD
from lockstep.runtime.executor import aligned, encode
from lockstep.runtime.step import COUNTER, KERNEL, ROW_WORDS
from lockstep.runtime.threads import Team

BF16 = np.dtype(ml_dtypes.bfloat16)
NO_SINKS = np.zeros(0, np.float32)


def ragged_paged_attention(
    q,
    kv_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    *,
    sm_scale=1.0,
    sliding_window=None,
    soft_cap=None,
    mask_value=None,
    k_scale=None,
    v_scale=None,
    sinks=None,
    out=None,
    threads=None,
    backend="cpu",
    num_kv_pages_per_block=None,
    num_queries_per_block=None,
    vmem_limit_bytes=None,
):
    """Causal attention of the last tokens of several sequences over their keys and values in pages.

    Shapes: q, out [T, H, K], float32 or bfloat16, K a multiple of 16 up to 512; kv_pages [N, B, 2 G, K] with the key of
      kv head g at 2 g and its value at 2 g + 1, or a pair (k_pages, v_pages) of [N, B, G, K], of float32, bfloat16,
      float8_e4m3fn, float8_e5m2 or int8; int32: kv_lens [S], page_indices [S, P], cu_q_lens [S + 1], num_seqs [1];
      sinks float32 [H]. Arrays may be views with any strides, as long as the numbers of a head lie together. out must
      not overlap an input.
    Units: kv_lens counts tokens, this call's included: rows cu_q_lens[s] .. cu_q_lens[s + 1] of q are the last tokens
      of sequence s, whose position p is in slot p % B of page page_indices[s, p // B]. Scores are q . k * sm_scale *
      k_scale, then soft_cap * tanh(score / soft_cap); values are multiplied by v_scale. A row sees its own position
      and, with a window, sliding_window positions in all. A sink joins the softmax as one more score, without a value.
    Error, Order: see `ragged_attention.attend_ragged`. All arithmetic is float32, whatever type the pages have; a
      bfloat16 result is that of float32, rounded once.
    threads: number of threads; by default one for each core. backend: "cpu", or "reference" for the definition (slow).
    mask_value and the last three arguments are accepted and change nothing: hidden keys are not read, and the cut of
    the work into blocks is part of the numerics. Raises ValueError for arguments that break a rule. Returns out, with
    zeros in the rows that belong to no sequence. Thread-safe; calls with the same number of threads run one at a time.
    """
    (k, v), sequences = checks.pages(kv_pages), Sequences(kv_lens, page_indices, cu_q_lens, num_seqs)
    checks.shapes(q, k, sequences)
    checks.scoring(q.shape[1], sliding_window, soft_cap, mask_value, sinks)
    checks.resources(backend, page_indices.shape[1], num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes)
    num_threads, inputs = checks.thread_count(threads), (q, k, v, *sequences, sinks)
    out = np.empty(q.shape, q.dtype) if out is None else checks.output(out, q, inputs)
    checks.metadata(q.shape[0], k.shape, sequences, sliding_window)
    scoring = scoring_of(sm_scale, soft_cap, k_scale, v_scale, sliding_window, sinks)
    if backend == "reference":
        run_definition(q, k, v, sequences, scoring, out)
    else:
        workers(num_threads).attend(q, k, v, sequences, scoring, out)
    return out


def scoring_of(sm_scale, soft_cap=None, k_scale=None, v_scale=None, sliding_window=None, sinks=None):
    """The Scoring that arguments of `ragged_paged_attention` ask for; ValueError if a scale is not finite."""
    numbers = {"sm_scale": sm_scale, "soft_cap": soft_cap, "k_scale": k_scale, "v_scale": v_scale}
    for name, value in numbers.items():
        checks.finite(name, value)
    with np.errstate(over="ignore"):
        factor = np.float32(sm_scale) * np.float32(1 if k_scale is None else k_scale)
        scale, cap = interpreted(score_scales)(factor, np.float32(abs(soft_cap or 0)))
    checks.finite("sm_scale * k_scale / soft_cap", scale)
    v_factor = np.float32(1 if v_scale is None else v_scale)
    return Scoring(
        np.float32(scale), np.float32(cap), v_factor, sliding_window or 0, NO_SINKS if sinks is None else sinks
    )


def run_definition(q, k, v, sequences, scoring, out):
    """The definition on checked arguments: all numbers are widened to float32, and the result is rounded once."""
    q_THK, k_NBGK, v_NBGK = (np.ascontiguousarray(x, np.float32) for x in (q, k, v))
    out_THK = np.empty(q.shape, np.float32)
    contiguous = Sequences(*map(np.ascontiguousarray, sequences))
    scoring = scoring._replace(sinks=np.ascontiguousarray(scoring.sinks))
    attend_ragged(q_THK, k_NBGK, v_NBGK, contiguous, scoring, out_THK)
    out[...] = out_THK


class Workers:
    """A team of threads, with memory for the sums of tiles between their spans; made once, used by every call."""

    def __init__(self, num_threads):
        self.team, self._lock = Team(num_threads), threading.Lock()
        num_tiles = TILES_PER_THREAD * num_threads
        self._states, self._row = aligned(STATE_BYTES * num_tiles), aligned(8 * ROW_WORDS).view(np.int64)
        self._counter = aligned(8).view(np.int64)
        self._row[COUNTER] = self._counter.ctypes.data
        self._row_address = self._row.ctypes.data

    def attend(self, q, k, v, sequences, scoring, out, grouped=True):
        """One call of the kernel on checked arguments. grouped: query heads of one kv head share its read."""
        H, G = q.shape[1], k.shape[2]
        values = dict(
            out=out.ctypes.data,
            states=self._states.ctypes.data,
            q=q.ctypes.data,
            k=k.ctypes.data,
            v=v.ctypes.data,
            kv_lens=sequences.kv_lens.ctypes.data,
            page_indices=sequences.page_indices.ctypes.data,
            cu_q_lens=sequences.cu_q_lens.ctypes.data,
            num_seqs=sequences.num_seqs.ctypes.data,
            sinks=scoring.sinks.ctypes.data if scoring.sinks.size else None,
            out_token=out.strides[0],
            out_head=out.strides[1],
            q_token=q.strides[0],
            q_head=q.strides[1],
            k_page=k.strides[0],
            k_slot=k.strides[1],
            k_head=k.strides[2],
            v_page=v.strides[0],
            v_slot=v.strides[1],
            v_head=v.strides[2],
            table_row=sequences.page_indices.strides[0],
            num_tokens=q.shape[0],
            num_heads=H,
            num_kv_heads=G,
            head_dim=q.shape[2],
            page_size=k.shape[1],
            unit_heads=H // G if grouped else 1,
            window=scoring.window,
            q_bf16=q.dtype == BF16,
            scale=scoring.scale,
            cap=scoring.cap,
            v_scale=scoring.v_scale,
        )
        with self._lock:
            encode(RaggedAttention, self._row, values)
            self._row[KERNEL], self._counter[:] = kernel_address(k.dtype), 0
            self.team.run(self._row_address, 1, 0)


@cache
def kernel_address(dtype):
    """The address of the kernel for pages of a type; compiles or loads the kernel on first use."""
    return KERNELS[checks.PAGE_DTYPES[dtype]].address


@cache
def workers(num_threads):
    """The Workers with num_threads threads: the same for the whole process."""
    return Workers(num_threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=workers.cache_clear)  # threads do not survive a fork
