"""Tokens of an answer, without an engine: text and end are the same wherever an answer goes on, and tokens that cannot
be the beginning of an answer are refused."""

import codecs
import math

import numpy as np
import pytest

from lockstep.engine import answer_tokens
from lockstep.engine.answer_tokens import NotItsAnswer, append_token, given_lists
from lockstep.engine.request import Request, SamplingParams
from tests.resume.faults import TEXT_FAULTS

EOS, VOCAB = frozenset([0]), 256
TEXT = "a€ab éabb\n😀"
STOPS = ("ab", "bb\n", "€a", "é", "b\n😀", "a€ab éabb\n😀a")


class Bytes:
    """A Detokenizer whose tokens are bytes."""

    def __init__(self, request):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        return self._decoder.decode(bytes([token]))

    def finish(self):
        return self._decoder.decode(b"", True)


def whole(params, tokens):
    """(Request that took tokens in until its answer ended, its finish_reason, characters certain after each)."""
    request, certain = Request(0, [1, 2], params), [0]
    for token in tokens:
        reason = append_token(request, token, EOS, Bytes)
        if reason is not None:
            request.answer.finish()
        certain.append(len(request.text))
        if reason is not None:
            return request, reason, certain
    return request, None, certain


def begun(params, given, recompute=True):
    """A Request whose answer begins with given tokens."""
    request = Request(1, [1, 2], params)
    answer_tokens.resume(request, given, EOS, Bytes, VOCAB, recompute)
    return request


def continued(params, given, rest):
    """(Request that went on from given tokens, its finish_reason, characters certain at the seam)."""
    request = begun(params, given)
    reason, certain = request.ends_as, request.num_given_characters
    for token in rest if reason is None else []:
        reason = append_token(request, token, EOS, Bytes)
        if reason is not None:
            request.answer.finish()
            break
    return request, reason, certain


def differing():
    """How many answers go on differently, of random ones, each cut at every place."""
    rng, num_cut, num_different = np.random.default_rng(3), 0, 0
    for i in range(60):
        tokens = [int(token) for _ in range(3) for token in TEXT[rng.integers(len(TEXT)) :].encode()]
        tokens = [0 if rng.random() < 0.02 else token for token in tokens]
        stop = tuple(rng.choice(STOPS, rng.integers(0, 3)).tolist())
        options = dict(
            min_tokens=int(rng.integers(0, 9)), include_stop_str_in_output=bool(i % 2), ignore_eos=i % 3 == 0
        )
        params = SamplingParams(max_tokens=int(rng.integers(9, 60)), stop=stop, **options)
        params = SamplingParams(**vars(params) | dict(min_tokens=0)) if i % 3 else params
        request, reason, certain = whole(params, tokens)
        for cut in range(1, len(request.output_ids) + 1):
            other, *ends = continued(params, tokens[:cut], tokens[cut:])
            same = [(r.output_ids, r.text, r.stop_reason) for r in (request, other)]
            num_different += same[0] != same[1] or ends != [reason, certain[cut]]
            num_cut += 1
    assert num_cut > 500
    return num_different


def test_text_and_end_are_the_same_wherever_an_answer_goes_on():
    assert differing() == 0


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_a_mistake_is_seen(fault, monkeypatch):
    TEXT_FAULTS[fault](monkeypatch)
    assert differing() > 5


def allow(*tokens):
    bits = np.zeros(VOCAB, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def broken(output_ids):
    raise KeyError("no such state")


@pytest.mark.parametrize(
    "options, given, message",
    [
        (dict(max_tokens=2), [65, 66, 67], r"expected at most max_tokens, 2, got 3 tokens"),
        (dict(), [65, 0, 66], r"the answer ends \(0\) before its token 2, 66"),
        (dict(stop=("AB",)), [65, 66, 67], r"the answer ends \('AB'\) before its token 2, 67"),
        (dict(min_tokens=3), [65, 0], r"token 1, 0, is not allowed there by min_tokens"),
        (dict(suppress_tokens=(66,)), [65, 66], r"token 1, 66, is not allowed there by suppress_tokens"),
        (
            dict(logits_mask=lambda ids: allow(65 + len(ids))),
            [65, 66, 66],
            r"token 2, 66, is not allowed .*logits_mask",
        ),
        (dict(logits_mask=broken), [65], r"before token 0, 65: logits_mask raised KeyError: 'no such state'"),
        (dict(logits_mask=lambda ids: np.zeros(3, np.uint32)), [65], r"before token 0, 65: logits_mask: expected None"),
    ],
)
def test_tokens_that_cannot_begin_the_answer_are_refused(options, given, message):
    with pytest.raises(NotItsAnswer, match=f"output_ids: {message}"):
        begun(SamplingParams(**options), given)


def test_a_mask_is_called_once_for_each_token_with_the_answers_own_list():
    calls = []
    request = begun(SamplingParams(logits_mask=lambda ids: calls.append((id(ids), len(ids)))), [65, 66])
    assert calls == [(id(request.output_ids), 0), (id(request.output_ids), 1)]


def test_an_answer_that_is_given_whole_has_ended_unless_something_is_to_be_computed():
    params = SamplingParams(max_tokens=2, logprobs=1)
    ended, waits = begun(params, [65, 66], False), begun(params, [65, 66])
    assert (ended.finish_reason, ended.ends_as, ended.text) == ("length", None, "AB")
    assert all(map(math.isnan, ended.logprobs)) and ended.top_logprobs == [{}, {}]
    assert (waits.finish_reason, waits.ends_as, waits.logprobs) == (None, "length", [])
    of_prompt = begun(SamplingParams(max_tokens=2, prompt_logprobs=0), [65, 66], False)
    assert (of_prompt.finish_reason, of_prompt.ends_as) == (None, "length")


def test_tokens_are_given_for_each_sample():
    assert given_lists((), 3) == [[], [], []]
    assert given_lists(np.array([1, 2]), 1) == given_lists([[1, 2]], 1) == [[1, 2]]
    assert given_lists([(), [3], np.array([4])], 3) == [[], [3], [4]]


@pytest.mark.parametrize(
    "given, num_samples, message",
    [
        (5, 1, "expected a list of token ids, got 5"),
        ([1, 2], 2, "a list of token ids for each of 2 samples, got 1"),
        ([[1], [2], [3]], 2, "a list of token ids for each of 2 samples, got 3"),
        ([1, 2.5], 1, "expected text or a list of token ids, got"),
        ([1, [2]], 2, "expected text or a list of token ids, got 1"),
        ("ab", 2, "expected text or a list of token ids, got 'a'"),
    ],
)
def test_what_are_no_tokens_is_refused(given, num_samples, message):
    with pytest.raises(ValueError, match=f"output_ids: .*{message}"):
        given_lists(given, num_samples)
