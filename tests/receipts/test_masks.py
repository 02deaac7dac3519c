"""Masks of known answers: computed before the engine's steps, and bounded."""

import time

import numpy as np
import pytest

from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM
from lockstep.receipts import masks
from lockstep.receipts.envelope import Envelope
from lockstep.receipts.masks import KnownMasks, TooMuch, known_masks
from lockstep.receipts.replay import InTurn

SLOW = "start: s\ns: s s | /[\\s\\S]/ |"


def numbered(output_ids):
    """A mask that says how many tokens there are; none after the first."""
    return None if len(output_ids) == 1 else np.full(3, len(output_ids) // 2, np.uint32)


def test_they_are_those_of_the_mask():
    found = known_masks(numbered, [5, 6, 7, 8, 9])
    assert isinstance(found, KnownMasks)
    for ids in ([], [5], [5, 6], [5, 6, 7, 8]):
        expected = numbered(ids)
        assert found(ids) is None if expected is None else (found(ids) == expected).all()
    in_turn = [mask if mask is None else mask.tolist() for mask in InTurn(found).masks([], [5, 6, 7])]
    assert in_turn == [[0] * 3, None, [1] * 3, [1] * 3]


def test_an_error_ends_them():
    def broken(output_ids):
        if len(output_ids) == 2:
            raise RuntimeError("no such token")
        return numbered(output_ids)

    found = known_masks(broken, [5, 6, 7, 8])
    assert found([]) is not None and found([5]) is None
    with pytest.raises(RuntimeError, match="no such token"):
        found([5, 6])


def test_time_and_memory_are_bounded(monkeypatch):
    def slow(output_ids):
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return numbered(output_ids)

    with pytest.raises(TooMuch, match=r"more than 0.05 s"):
        known_masks(slow, [5] * 1000, 0.05)
    monkeypatch.setattr(masks, "MAX_BYTES", 50)
    with pytest.raises(TooMuch, match="more than 0 MB"):
        known_masks(numbered, [5] * 1000)
    known_masks(lambda output_ids: np.zeros(3, np.uint32), [5] * 1000)  # one of them is kept once


def test_a_form_that_takes_too_long_is_not_checked():
    with LLM(threads=1, max_context=256, max_requests=1, progress=False) as llm:
        [made] = llm.generate("x", SamplingParams(max_tokens=40, ignore_eos=True), grammar=SLOW, receipt=True)
        assert made.receipt is not None and llm.verify(made.receipt).is_true
        llm.verifier.mask_seconds = 0.0
        found = llm.verify(made.receipt)
        assert (found.code, found.what) == (2, "form") and "more than 0 s" in found.reason
        many = SamplingParams(max_tokens=200, ignore_eos=True, stop_token_ids=tuple([9] * 200_000))
        [made] = llm.generate("x", many, receipt=True)
        began = time.thread_time()
        assert made.receipt is not None
        found = llm.verify(Envelope(made.receipt.envelope.payload))
        assert found.is_true and time.thread_time() - began < 2
