"""Runs a prompt through a checkpoint and the engine's runner; returns the logits of every position."""

import itertools

import numpy as np

from lockstep.engine.cache.pages import everywhere
from lockstep.engine.model import load_model
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.models.checkpoint import open_checkpoint
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore

TOLERANCE = 1e-4


def load(folder, weights="f32", kv_dtype=None, max_context=256, rope="auto"):
    """A checkpoint's model, with packed weights in memory only, not on disk."""
    return load_model(open_checkpoint(folder), WeightStore(), weights, kv_dtype, max_context, rope)


def logits_of(model, ids, cuts=(), slots=None, num_threads=2, dirty=False, **runner):
    """Logits [tokens, V] of a prompt fed in pieces that end at `cuts`.

    slots: the state slot of each piece (all the same in a sound run). dirty: another prompt ran in the same memory
    before. runner: more keywords of Runner.
    """
    bounds = [0, *cuts, len(ids)]
    num_pages = -(-len(ids) // PAGE_TOKENS)
    team = Team(num_threads)
    try:
        engine = Runner(model, team, Limits(len(ids), 3, num_pages + 2, len(ids)), **runner)
        pages = everywhere(range(num_pages + 1, 1, -1))
        if dirty:
            engine.step([Span(ids[::-1], 0, pages, 1, {len(ids) - 1: {}})])
        return np.concatenate(
            [
                _piece(engine, ids, start, stop, pages, slots[i] if slots else 1)
                for i, (start, stop) in enumerate(itertools.pairwise(bounds))
            ]
        )
    finally:
        team.close()


def _piece(runner, ids, start, stop, pages, slot):
    span = Span(ids[start:stop], start, pages, slot, {row: {} for row in range(stop - start)})
    return runner.step([span])[2].copy()


def difference(found, expected):
    """(largest absolute difference, positions whose argmax differs); infinite if a logit is not finite."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not np.isfinite(found).all():
        return float("inf"), len(found)
    return float(np.abs(found - expected).max()), int((found.argmax(-1) != expected.argmax(-1)).sum())


def check(found, expected, tolerance=TOLERANCE):
    """Asserts that logits agree within the tolerance and in every argmax."""
    worst, flips = difference(found, expected)
    assert worst <= tolerance and flips == 0, (
        f"max_abs_diff {worst:.3g} (allowed {tolerance:.3g}), {flips} argmax differ"
    )
