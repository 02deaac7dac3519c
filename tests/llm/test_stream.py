"""Streams of `LLM`: values of their own, the final Completion, and what leaving one does."""

import copy
import gc
import pickle

import pytest

from lockstep import LLM, CompletionChunk, CompletionStream, SamplingParams
from lockstep.text.tool_calls.events import Arguments, CallStart, Content, Reasoning

PROMPT = "def read_lines(path):\n"
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3, logprobs=2, ignore_eos=True)
ASKED = [dict(role="user", content="Hello")]


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, max_context=512) as made:
        yield made


def test_chunks_are_values_that_add_up_to_the_completion(llm):
    stream = llm.stream(PROMPT, PARAMS)
    with pytest.raises(ValueError, match="the answer goes on"):
        _ = stream.completion
    chunks = list(stream)
    made, [expected] = stream.completion, llm.generate(PROMPT, PARAMS)
    assert made == expected and stream.completion is made and isinstance(stream, CompletionStream)
    assert "".join(chunk.text for chunk in chunks) == "".join(chunk.content for chunk in chunks) == made.text
    for name in ("token_ids", "logprobs", "top_logprobs"):
        assert [each for chunk in chunks for each in getattr(chunk, name)] == getattr(made, name)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(isinstance(chunk, CompletionChunk) for chunk in chunks) and next(stream, None) is None
    with pytest.raises(AttributeError):
        chunks[0].text = ""
    for value in (chunks[-1], made):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value


def left(llm, leave):
    """A stream of many tokens after two chunks, and then `leave`."""
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream), next(stream)
    leave(stream)
    return stream


def breaks(stream):
    for _ in stream:
        break


def fails(stream):
    with pytest.raises(KeyboardInterrupt), stream:
        raise KeyboardInterrupt


@pytest.mark.parametrize("leave", [breaks, fails, CompletionStream.close])
def test_a_stream_that_is_left_is_cancelled(llm, leave):
    stream = left(llm, leave)
    assert not llm.engine.has_work and list(stream) == []
    assert stream.completion.finish_reason == "cancelled" and 2 <= len(stream.completion.token_ids) <= 3
    assert "cancelled" in repr(stream) and "cancelled" in repr(stream.completion)


def test_a_stream_that_nobody_holds_is_cancelled(llm):
    left(llm, lambda stream: None)
    gc.collect()
    assert not llm.engine.has_work


def test_a_stream_is_held_to_a_form(llm):
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=20), regex="[a-c]{3}-[0-9]")
    assert "".join(chunk.text for chunk in stream) == stream.completion.text and stream.completion.text[3] == "-"
    with pytest.raises(ValueError, match="regex: "):
        llm.stream(PROMPT, regex="(")


def test_a_conversation_streams_what_chat_answers(llm):
    stream = llm.stream_chat(ASKED, PARAMS)
    assert "".join(chunk.content for chunk in stream) == stream.completion.content
    assert stream.completion == llm.chat(ASKED, PARAMS)


def test_thoughts_and_content_come_apart_and_calls_at_the_end(llm):
    class Parser:
        def push(self, text):
            return [Content(text[:1]), Reasoning(text[1:])]

        def finish(self, is_cut=False):
            return [CallStart(0, "id", "f"), Arguments(0, "{}")]

    stream = CompletionStream(llm.engine, llm.start(PROMPT, PARAMS).request, Parser)
    chunks = list(stream)
    assert all(chunk.text == chunk.content + chunk.reasoning for chunk in chunks)
    assert [call.name for call in stream.completion.tool_calls] == ["f"]


def test_what_is_shown_of_an_answer_is_short(llm):
    [answer] = llm.generate(["x = 1\n" * 40], SamplingParams(max_tokens=3, n=2, temperature=1.0))
    assert repr(answer).startswith("Completion(text=") and "+ 3 tokens, 2 samples)" in repr(answer)
    assert len(repr(answer)) < 200
