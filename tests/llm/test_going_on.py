"""`output_ids` of LLM: answers go on from their tokens, in every method, and streams bring what is new only."""

import pytest

from lockstep import LLM, SamplingParams
from tests.serve.chatting import HELLO, THINKING, Script, with_template

PROMPTS = ["class Queue:\n    ", "import os\n"]
PARAMS = SamplingParams(
    max_tokens=20, temperature=0.9, seed=4, repetition_penalty=1.2, logprobs=1, stop=("\n\n", "pass")
)


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, max_requests=8, max_context=512) as made:
        yield with_template(made, THINKING)


def test_batches_and_samples_go_on(llm):
    params = [PARAMS, SamplingParams(max_tokens=9, temperature=1, seed=2, n=2)]
    whole = llm.generate(PROMPTS, params)
    known = [whole[0].token_ids[:5], [sample.token_ids[:i] for i, sample in enumerate(whole[1].samples)]]
    assert llm.generate(PROMPTS, params, output_ids=known) == whole
    assert llm.generate(PROMPTS, params, output_ids=[None, known[1]]) == whole
    assert llm.generate(PROMPTS[0], PARAMS, output_ids=whole[0].token_ids) == whole[:1]


@pytest.mark.parametrize("num_known", [1, 9, 20])
def test_a_stream_brings_what_is_new(llm, num_known):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    with llm.stream(PROMPTS[0], params) as before:
        known = [next(before) for _ in range(num_known)]
    ids = [token for chunk in known for token in chunk.token_ids]
    rest = llm.stream(PROMPTS[0], params, output_ids=ids)
    chunks = list(rest)
    [whole] = llm.generate(PROMPTS[0], params)
    assert rest.completion == whole and chunks[-1].finish_reason == "length"
    assert "".join(chunk.text for chunk in [*known, *chunks]) == whole.text
    assert [*ids, *(token for chunk in chunks for token in chunk.token_ids)] == whole.token_ids


def test_a_conversation_with_thoughts_goes_on(llm):
    params = SamplingParams(max_tokens=40, logits_mask=Script(llm, "<think>\nhmm 1 < 2</think>\n\nso: a <b>"))
    stream = llm.stream_chat(HELLO, params)
    whole = list(stream)
    assert stream.completion.reasoning == "hmm 1 < 2" and stream.completion.content == "so: a <b>"
    for cut in range(1, len(whole) + 1, 4):
        ids = [token for chunk in whole[:cut] for token in chunk.token_ids]
        rest = llm.stream_chat(HELLO, params, output_ids=ids)
        chunks = [*whole[:cut], *rest]
        for name in ("text", "content", "reasoning"):
            assert "".join(getattr(chunk, name) for chunk in chunks) == getattr(stream.completion, name)
        assert rest.completion == stream.completion
    assert llm.chat(HELLO, params, output_ids=ids[:9]) == stream.completion


@pytest.mark.parametrize(
    "given, message",
    [
        (5, "expected a list of lists of token ids, got 5"),
        ([1, 2], "expected a list of token ids, got 1"),
        ([[1]], "expected a list of token ids or None for each of 2 prompts, got 1"),
        ([[1], [10**9]], "token ids must be 0 to"),
        ([[1], ["x"]], "expected text or a list of token ids"),
        ([list(range(1, 22)), None], "expected at most max_tokens, 20, got 21 tokens"),
    ],
)
def test_what_are_no_tokens_is_refused_and_nothing_runs(llm, given, message):
    with pytest.raises(ValueError, match=f"output_ids: .*{message}"):
        llm.generate(PROMPTS, PARAMS, output_ids=given)
    assert not llm.engine.has_work
