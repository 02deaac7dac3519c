"""`Completion`: the result of a generation, and `Stream`: its text while it is generated."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lockstep.engine.engine import Engine
from lockstep.engine.request import Request, SamplingParams

Prompt = str | Sequence[int]  # text, or token ids


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its id, the tool's name, and the arguments as JSON text."""

    id: str
    name: str
    arguments: str

    def as_message(self) -> dict[str, Any]:
        """The call as an assistant's message has it."""
        return dict(id=self.id, type="function", function=dict(name=self.name, arguments=self.arguments))


@dataclass
class Completion:
    """The answer to one prompt.

    text: without the prompt. token_ids, logprobs: the generated tokens and the natural logarithm of each one's
    probability. top_logprobs: for each generated token {token id: log-probability}, the most probable first, where
    SamplingParams.logprobs asks for them. prompt_logprobs, prompt_top_logprobs: the same for the prompt's tokens from
    the second on, where SamplingParams.prompt_logprobs asks for them. finish_reason: "stop", "length" (max_tokens, or
    the context is full) or "error". stop_reason: the token id or string that stopped the answer. error: what went
    wrong, in one sentence. others: the second and later samples, where SamplingParams.n is more than 1. Of `LLM.chat`:
    content: the text without thoughts and tool calls, which is all of it in `generate`; reasoning: the thoughts;
    tool_calls: the ToolCalls.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_token_ids: list[int]
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)
    stop_reason: int | str | None = None
    error: str | None = None
    others: list["Completion"] = field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def samples(self) -> list["Completion"]:
        """All samples of the prompt, this one first."""
        return [self, *self.others]

    def as_message(self) -> dict[str, Any]:
        """The answer as the assistant's message of a conversation that goes on. Thoughts are no part of it."""
        calls = [call.as_message() for call in self.tool_calls]
        return dict(role="assistant", content=self.content) | (dict(tool_calls=calls) if calls else {})


def completion(request: Request, *others: Request) -> Completion:
    """The Completion of a request that has ended. others: the further samples of the same prompt."""
    assert request.finish_reason is not None, "the request has not ended"
    return Completion(
        text=request.text,
        token_ids=request.output_ids,
        logprobs=request.logprobs,
        finish_reason=request.finish_reason,
        prompt_token_ids=request.prompt_ids,
        top_logprobs=request.top_logprobs,
        prompt_logprobs=request.prompt_logprobs,
        prompt_top_logprobs=request.prompt_top_logprobs,
        stop_reason=request.stop_reason,
        error=request.error,
        others=[completion(other) for other in others],
        content=request.text,
    )


class Stream:
    """A request's text while it is generated: `text` is all of it so far, `new_text` what the last `advance` added.

    Text only grows: no character is taken back. The request itself, with its token ids, is `request`.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.text, self.new_text = request, "", ""

    def advance(self) -> None:
        """Updates `text` and `new_text` with what the engine has generated since the last call."""
        self.new_text = self.request.text[len(self.text) :]
        self.text += self.new_text


class Starts(Protocol):
    """What starts requests: an `LLM`."""

    engine: Engine

    def start_samples(self, prompt: Prompt, params: SamplingParams, prediction: Prompt | None = None) -> list[Stream]:
        """Queues the samples of a prompt."""
        ...


def run_all(
    llm: Starts, prompts: Sequence[Prompt], params: Sequence[SamplingParams], predictions: Sequence[Any]
) -> list[list[Stream]]:
    """Runs every prompt's samples to their end and returns their Streams; runs nothing if one prompt is refused. An
    exception, such as Ctrl-C, cancels the requests that have not ended."""
    started: list[list[Stream]] = []
    try:
        for arguments in zip(prompts, params, predictions, strict=True):
            started.append(llm.start_samples(*arguments))
        for stream in itertools.chain(*started):
            while stream.request.finish_reason is None:
                llm.engine.step()
            stream.advance()
    finally:
        for stream in itertools.chain(*started):
            llm.engine.cancel(stream.request)
    return started


def prompt_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """The prompts as a list; a single string becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    listed: Any = prompts
    try:
        return list(listed)
    except TypeError:
        raise ValueError(f"prompts: expected text or a list of prompts, got {prompts!r:.80}") from None
