"""Mixture of experts: the choice of a token's experts, the order of tokens by expert, the weighted sum. Definitions.

route:    probability = softmax(logits[t]);  the top_k experts and their probabilities
group:    the (token, rank) pairs in order of expert, so that an expert's weights are read once
combine:  out[t] = sum over ranks r of weight[t, r] * y[t, r], plus sigmoid(gate[t]) * shared[t] of a shared expert
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array, int_array
from lockstep.native.numbers import carray, int32
from lockstep.native.simd import fma, peek
from lockstep.ops.math import ZERO, exp, sigmoid, tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, constant, output, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows


class Route(Operands):
    """The top_k experts of each row of logits, and their probabilities, times a factor of each expert if there is a
    scale; a row of logits is `width` wide."""

    rules = ("1 <= top_k <= num_experts <= width",)
    expert_ids: Tensor = output("top_k", dtype="i32")
    weights: Tensor = output("top_k")
    logits: Tensor = rows("width")
    scale: Weight | None = constant("num_experts", optional=True)
    num_experts: int
    top_k: int
    renormalise: bool
    width: int


class GroupExperts(Operands):
    """order: the pairs (token, rank) in order of expert; expert_start: where each expert's pairs begin, in row 0."""

    order: Tensor = output("top_k", dtype="i32")
    expert_start: Tensor = output("num_experts + 1", dtype="i32")
    expert_ids: Tensor = rows("top_k", dtype="i32")
    num_experts: int
    top_k: int


class CombineExperts(Operands):
    """out[t] = sum over ranks r of weights[t, r] * y[t, r], and of an expert that all tokens share, if there is one, in
    addition sigmoid(gate) * shared_y[t]; its gate is column gate_column of gates."""

    out: Tensor = output("width")
    weights: Tensor = rows("top_k")
    y: Tensor = rows("top_k * width")
    shared_y: Tensor | None = rows("width", optional=True)
    gates: Tensor | None = rows("gates_width", optional=True)
    width: int
    top_k: int
    gates_width: int = 0
    gate_column: int = 0

    def check(self):
        has_column = self.gates is not None and self.gate_column < self.gates_width
        if (self.shared_y is None) != (self.gates is None) or (self.shared_y is not None and not has_column):
            raise ValueError(
                f"CombineExperts: expected a shared expert and its gate, or neither, got shared_y {self.shared_y} and "
                f"column {self.gate_column} of gates {self.gates}"
            )


@inlined
def bounded(place, count):
    """A place as it is if it is one of 0 .. count - 1, else the last of them. Places are read from memory, so that one
    wrong bit may lead to a wrong answer, but never to memory that is nobody's."""
    return place if 0 <= place < count else count - 1


@inlined
def place_at(places, index, count):
    """One of an array of int32 places, bounded by their number."""
    return bounded(np.int64(peek(places + 4 * index, int32)), count)


@definition
def route(logits_TE, scale_E, top_k, renormalise, expert_ids_TX, weights_TX):
    """Chooses top_k experts for every token.

    Shapes: logits [T, E] float32 without NaN; expert_ids [T, X] int32 and weights [T, X] float32 with X = top_k <= E,
      the likeliest expert first; scale [E], or [0] for none.
    Units: with renormalise a token's weights sum to one (`norm_topk_prob`).
    Error: below 8 ulp.
    Order: experts by (logit descending, index ascending). Sum of exp(logit - largest) over all experts in 16 lanes and
      a tree; weight = exp(logit - largest) / sum; renormalised by a division by the sum of weights in rank order; then
      weight * scale.
    Source: transformers, Qwen3MoeTopKRouter; Shazeer et al. 2017.
    """
    T, E = logits_TE.shape
    lane = np.empty(16, np.float32)
    for t in range(T):
        rank_experts(logits_TE[t], expert_ids_TX[t])
        largest = logits_TE[t, expert_ids_TX[t, 0]]
        lane[:] = ZERO
        for e in range(E):
            lane[e % 16] += exp(logits_TE[t, e] - largest)
        total, chosen = tree_sum(lane), ZERO
        for r in range(top_k):
            weights_TX[t, r] = exp(logits_TE[t, expert_ids_TX[t, r]] - largest) / total
            chosen += weights_TX[t, r]
        if renormalise:
            for r in range(top_k):
                weights_TX[t, r] = weights_TX[t, r] / chosen
        if scale_E.size > 0:
            for r in range(top_k):
                weights_TX[t, r] = weights_TX[t, r] * scale_E[expert_ids_TX[t, r]]


@definition
def rank_experts(logits_E, expert_ids_X):
    """The experts of largest logit, in descending order of logits."""
    for r in range(expert_ids_X.size):
        best = -1
        for e in range(logits_E.size):
            free = True
            for earlier in range(r):
                free = free and expert_ids_X[earlier] != e
            if free and (best < 0 or logits_E[e] > logits_E[best]):
                best = e
        expert_ids_X[r] = best


@definition
def group_experts(expert_ids_TX, order_TX, expert_start_TE1):
    """Groups the pairs (token t, rank r), numbered t * X + r, by expert.

    Shapes: expert_ids, order [T, X] int32; expert_start [T, E + 1] int32, of which row 0 counts and the rest is zero.
    Order: order, read flat, holds the pairs of expert 0 by ascending number, then those of expert 1, ...; the pairs of
      expert e are at expert_start[0, e] .. expert_start[0, e + 1] - 1. An id that is no expert's, which `route` never
      gives, counts as the last expert's (`bounded`).
    """
    T, X = expert_ids_TX.shape
    E = expert_start_TE1.shape[1] - 1
    expert_start_TE1[:, :] = 0
    at = 0
    for e in range(E):
        expert_start_TE1[0, e] = at
        for pair in range(T * X):
            if bounded(expert_ids_TX[pair // X, pair % X], E) == e:
                order_TX[at // X, at % X] = pair
                at += 1
    expert_start_TE1[0, E] = at


@definition
def combine_experts(weights_TX, y_TXD, out_TD):
    """The weighted sum of the outputs of a token's experts.

    Shapes: weights [T, X] float32; y [T, X, D] float32, by rank; out [T, D]; D a multiple of 16.
    Error: X roundings.
    Order: acc = fma(weight[r], y[r, i], acc) over ranks r ascending, from +0.
    """
    T, X, D = y_TXD.shape
    for t in range(T):
        for i in range(D):
            acc = ZERO
            for r in range(X):
                acc = fma(weights_TX[t, r], y_TXD[t, r, i], acc)
            out_TD[t, i] = acc


@definition
def add_shared_expert(shared_TD, gate_T, out_TD):
    """Adds the output of the expert that all tokens share, times the sigmoid of its gate, to out.

    Shapes: shared, out [T, D] float32; gate [T].
    Error: below 3 ulp of the product, and one rounding of the sum.
    Order: sigmoid as in `ops/math.py`; out = fma(sigmoid(gate), shared, out).
    Source: transformers, Qwen3NextSparseMoeBlock.
    """
    T, D = shared_TD.shape
    for t in range(T):
        share = sigmoid(gate_T[t])
        for i in range(D):
            out_TD[t, i] = fma(share, shared_TD[t, i], out_TD[t, i])


@kernel
def _route(op, step, thread, num_threads):
    if thread == 0:
        a, T = Route.read(op), num_rows(op, step)
        logits_TE, shape = carray(float_array(a.logits), (T, a.width))[:, : a.num_experts], (T, a.top_k)
        ids_TX, weights_TX = carray(int_array(a.expert_ids), shape), carray(float_array(a.weights), shape)
        scale_E = carray(float_array(a.scale), (a.num_experts if a.scale != 0 else 0,))
        route(logits_TE, scale_E, a.top_k, a.renormalise, ids_TX, weights_TX)


@kernel
def _group(op, step, thread, num_threads):
    if thread == 0:
        a, T = GroupExperts.read(op), num_rows(op, step)
        ids_TX, order_TX = carray(int_array(a.expert_ids), (T, a.top_k)), carray(int_array(a.order), (T, a.top_k))
        group_experts(ids_TX, order_TX, carray(int_array(a.expert_start), (T, a.num_experts + 1)))


@kernel
def _combine(op, step, thread, num_threads):
    if thread == 0:
        a, T = CombineExperts.read(op), num_rows(op, step)
        weights_TX = carray(float_array(a.weights), (T, a.top_k))
        y_TXD = carray(float_array(a.y), (T, a.top_k, a.width))
        out_TD = carray(float_array(a.out), (T, a.width))
        combine_experts(weights_TX, y_TXD, out_TD)
        if a.shared_y:
            gates_TW = carray(float_array(a.gates), (T, a.gates_width))
            add_shared_expert(carray(float_array(a.shared_y), (T, a.width)), gates_TW[:, a.gate_column], out_TD)


REFERENCE = {
    "route": Implementation(_route),
    "group_experts": Implementation(_group),
    "combine_experts": Implementation(_combine),
}
