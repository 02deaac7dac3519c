"""Mixture of experts: the fast kernels around the experts' linear layers. Bound by the read of y in combine."""

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.numbers import float32, int32, int64
from lockstep.native.simd import fma, lane_numbers, lanes, load, peek, poke, store, sum_lanes, to_f32, where_below
from lockstep.ops.linear.moe import CombineExperts, GroupExperts, Route, place_at
from lockstep.ops.math import ZERO, exp, sigmoid
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

INFINITY = np.float32(np.inf)
BLOCK = 512  # outputs of a row that a thread computes at a time


@kernel
def route(op, step, thread, num_threads):
    """Tokens are dealt to threads in turn."""
    a = Route.read(op)
    E, X = a.num_experts, a.top_k
    for t in range(thread, num_rows(op, step), num_threads):
        logits, ids, weights = a.logits + 4 * a.width * t, a.expert_ids + 4 * X * t, a.weights + 4 * X * t
        rank_experts(logits, E, X, ids, weights)
        weigh_experts(logits, E, X, a.renormalise, weights)
        for r in range(X if a.scale != 0 else 0):
            factor = peek(a.scale + 4 * int64(peek(ids + 4 * r, int32)), float32)
            poke(weights + 4 * r, peek(weights + 4 * r, float32) * factor)


@inlined
def rank_experts(logits, E, X, ids, best):
    """The X experts of largest logit, by insertion into a sorted list. The list is kept in the outputs: `best`, where
    weights will be, holds their logits."""
    for e in range(E):
        logit, r = peek(logits + 4 * e, float32), min(e, X)
        if r == X:
            if not logit > peek(best + 4 * X - 4, float32):
                continue
            r = X - 1
        while r > 0 and logit > peek(best + 4 * r - 4, float32):
            poke(best + 4 * r, peek(best + 4 * r - 4, float32))
            poke(ids + 4 * r, peek(ids + 4 * r - 4, int32))
            r -= 1
        poke(best + 4 * r, logit)
        poke(ids + 4 * r, np.int32(e))


@inlined
def weigh_experts(logits, E, X, renormalise, weights):
    """Turns the logits of the chosen experts into weights, in place."""
    largest, total, chosen = peek(weights, float32), lanes(ZERO), ZERO
    for e in range(0, E, 16):
        inside = where_below(to_f32(lane_numbers()), np.float32(E - e), load(logits + 4 * e), -INFINITY)
        total = total + exp(inside - largest)
    summed = sum_lanes(total)
    for r in range(X):
        weight = exp(peek(weights + 4 * r, float32) - largest) / summed
        poke(weights + 4 * r, weight)
        chosen += weight
    for r in range(X if renormalise else 0):
        poke(weights + 4 * r, peek(weights + 4 * r, float32) / chosen)


@kernel
def group_experts(op, step, thread, num_threads):
    """A counting sort by one thread, since a few thousand pairs are not worth sharing. The last thread clears
    expert_start after its first row."""
    a, T = GroupExperts.read(op), num_rows(op, step)
    order, start, ids, E, X = a.order, a.expert_start, a.expert_ids, a.num_experts, a.top_k
    if thread == num_threads - 1:
        for at in range(E + 1, T * (E + 1)):
            poke(start + 4 * at, np.int32(0))
    if thread == 0:
        count_experts(start, ids, E, T * X)
        # from the last pair down: the end of an expert's pairs moves down to their begin
        for pair in range(T * X - 1, -1, -1):
            end = start + 4 * place_at(ids, pair, E) + 4
            at = peek(end, int32) - 1
            poke(end, np.int32(at))
            poke(order + 4 * at, np.int32(pair))
        for e in range(E):
            poke(start + 4 * e, peek(start + 4 * e + 4, int32))
        poke(start + 4 * E, np.int32(T * X))


@inlined
def count_experts(start, ids, E, num_pairs):
    """start[e + 1] = the number of pairs of experts 0 .. e."""
    for e in range(E + 1):
        poke(start + 4 * e, np.int32(0))
    for pair in range(num_pairs):
        count = start + 4 * place_at(ids, pair, E) + 4
        poke(count, np.int32(peek(count, int32) + 1))
    for e in range(E):
        poke(start + 4 * e + 4, np.int32(peek(start + 4 * e, int32) + peek(start + 4 * e + 4, int32)))


@kernel
def combine_experts(op, step, thread, num_threads):
    """Blocks of every row are dealt to threads in turn."""
    a = CombineExperts.read(op)
    D, X, share = a.width, a.top_k, ZERO
    num_blocks = (D + BLOCK - 1) // BLOCK
    for task in range(thread, num_rows(op, step) * num_blocks, num_threads):
        t, first = task // num_blocks, task % num_blocks * BLOCK
        if a.shared_y:
            share = sigmoid(peek(a.gates + 4 * (a.gates_width * t + a.gate_column), float32))
        for i in range(first, min(first + BLOCK, D), 16):
            acc = lanes(ZERO)
            for r in range(X):
                acc = fma(peek(a.weights + 4 * (X * t + r), float32), load(a.y + 4 * (D * (X * t + r) + i)), acc)
            if a.shared_y:
                acc = fma(share, load(a.shared_y + 4 * (D * t + i)), acc)
            store(a.out + 4 * (D * t + i), acc)


CPU = {
    "route": Implementation(route),
    "group_experts": Implementation(group_experts),
    "combine_experts": Implementation(combine_experts),
}
