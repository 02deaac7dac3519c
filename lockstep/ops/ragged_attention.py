"""Attention of a ragged batch over pages of any size: the definition.

Sequence s owns rows cu_q_lens[s] .. cu_q_lens[s + 1] of q, the last tokens of the kv_lens[s] it has. Its position p
lies in slot p % B of page page_indices[s, p // B]. Each row is `attention.attend`, so that its bits are those of the
engine's attention, whatever the page size, the chunk and the rest of the batch; a sink then takes its share.
"""

import numpy as np

from lockstep.ops.attention import attend
from lockstep.ops.attention_math import LOG2E, ZERO, exp2
from lockstep.runtime.kernel import definition, inlined
from lockstep.runtime.simd import maximum


@inlined
def kept_share(top, total, sink):
    """What is left of a row's weights when a sink, a score without a value, joins its softmax.

    Units: top, total as `attend` returns them; sink: the score itself, in units of e.
    Order: s = sink * log2 e; M the larger of s and top; kept = total * 2**(top - M); kept / (kept + 2**(s - M)).
    """
    score = sink * LOG2E
    higher = maximum(score, top)
    kept = total * exp2(top - higher)
    return kept / (kept + exp2(score - higher))


@definition
def gathered(pages_NBGK, page_indices_P, g, first, stop):
    """Keys (or values) of one kv head at positions first .. stop, in an array [stop, K]; nothing else is read."""
    page_size, head_dim = pages_NBGK.shape[1], pages_NBGK.shape[3]
    rows_CK = np.zeros((stop, head_dim), np.float32)
    for position in range(first, stop):
        page = page_indices_P[position // page_size]
        for d in range(head_dim):
            rows_CK[position, d] = pages_NBGK[page, position % page_size, g, d]
    return rows_CK


@definition
def attend_ragged(
    q_THK,
    k_NBGK,
    v_NBGK,
    kv_lens_S,
    page_indices_SP,
    cu_q_lens_S,
    num_seqs,
    scale,
    cap,
    window,
    sinks_H,
    v_scale,
    out_THK,
):
    """out[t, h] = softmax(soft_cap(scale * q[t, h] . k)) v over the keys that row t sees; rows of no sequence are 0.

    Shapes: all float32 but the int32 kv_lens [S], page_indices [S, P], cu_q_lens [S + 1]; sinks [H], or [0]: none.
    Units: scale, cap as `score_scales` gives them; window 0: all keys up to the row's own, else that many.
    Error: 2e-6 of the float64 result for scores below 20 and |v| < 4, up to 2048 keys.
    Order: `attend`, then with a sink out * `kept_share`, then out * v_scale.
    Source: the arguments are those of JAX's Pallas kernel of the same name.
    """
    H, G = q_THK.shape[1], k_NBGK.shape[2]
    for t in range(q_THK.shape[0]):
        for h in range(H):
            for d in range(q_THK.shape[2]):
                out_THK[t, h, d] = ZERO
    for s in range(num_seqs):
        start, stop, length = cu_q_lens_S[s], cu_q_lens_S[s + 1], kv_lens_S[s]
        if start == stop:
            continue
        first = max(0, length - (stop - start) + 1 - window) if window > 0 else 0
        for g in range(G):
            k_CK = gathered(k_NBGK, page_indices_SP[s], g, first, length)
            v_CK = gathered(v_NBGK, page_indices_SP[s], g, first, length)
            for t in range(start, stop):
                for h in range(g * (H // G), (g + 1) * (H // G)):
                    position, out_K = length - (stop - t), out_THK[t, h]
                    top, total = attend(q_THK[t, h], k_CK, v_CK, position, window, (scale, cap), out_K, 0)
                    if sinks_H.size > 0:
                        share = kept_share(top, total, sinks_H[h])
                        for d in range(out_K.size):
                            out_K[d] = out_K[d] * share
                    for d in range(out_K.size):
                        out_K[d] = out_K[d] * v_scale
