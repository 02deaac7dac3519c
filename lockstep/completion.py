"""`Completion`: the result of a generation; `CompletionStream` and `CompletionChunk`: the same piece by piece."""

import functools
import itertools
import json
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

from lockstep.engine.engine import Engine
from lockstep.engine.request import Request, SamplingParams
from lockstep.interrupts import held_interrupts
from lockstep.progress import OnProgress, reporting
from lockstep.text.tool_calls.events import (
    Arguments,
    CallStart,
    Content,
    Event,
    Parser,
    Reasoning,
    finish_reason,
)

if TYPE_CHECKING:
    from lockstep.receipts.receipt import Receipt

Prompt = str | Sequence[int]  # text, or token ids
NewReceipt = Callable[[Request, int], "Receipt"]  # makes the receipt of a sample that has ended, given its number
CUT = ("length", "cancelled")  # reasons why an answer ended that may be in the middle of a tool call


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its id, the tool's name, and the arguments as JSON text."""

    id: str
    name: str
    arguments: str

    def as_message(self) -> dict[str, Any]:
        """The call as an assistant's message has it."""
        return dict(id=self.id, type="function", function=dict(name=self.name, arguments=self.arguments))


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    text: without the prompt. token_ids, logprobs: the generated tokens and the natural logarithm of each one's
    probability. top_logprobs: for each generated token {token id: log-probability}, the most probable first, where
    SamplingParams.logprobs asks for them. prompt_logprobs, prompt_top_logprobs: the same for the prompt's tokens from
    the second on, where SamplingParams.prompt_logprobs asks for them. finish_reason: "stop", "length" (max_tokens, or
    the context is full), "error", "tool_calls" of `LLM.chat`, or "cancelled" of a stream that was left. stop_reason:
    the token id or string that stopped the answer. error: what went wrong, in one sentence. others: the second and
    later samples, where SamplingParams.n is more than 1. receipt: where one was asked for. Of `LLM.chat`: content: the
    text without thoughts and tool calls, which is all of it in `generate`; reasoning: the thoughts; tool_calls: the
    ToolCalls.
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
    receipt: "Receipt | None" = None

    def __repr__(self) -> str:
        """All of it but the lists of tokens, whose lengths it says."""
        said = dict(text=self.text, finish_reason=self.finish_reason, stop_reason=self.stop_reason, error=self.error)
        said |= dict(reasoning=self.reasoning, tool_calls=self.tool_calls)
        shown = ", ".join(f"{name}={value!r}" for name, value in said.items() if value)
        samples = f", {len(self.samples)} samples" if self.others else ""
        return f"Completion({shown}, {len(self.prompt_token_ids)} + {len(self.token_ids)} tokens{samples})"

    @property
    def samples(self) -> list["Completion"]:
        """All samples of the prompt, this one first."""
        return [self, *self.others]

    def as_message(self) -> dict[str, Any]:
        """The answer as the assistant's message of a conversation that goes on. Thoughts are no part of it."""
        calls = [call.as_message() for call in self.tool_calls]
        return dict(role="assistant", content=self.content) | (dict(tool_calls=calls) if calls else {})


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """What a stream adds to an answer: the text and the tokens that came since the chunk before.

    text: the characters that became certain, which may be none. token_ids, logprobs, top_logprobs: see Completion.
    finish_reason, stop_reason: None, but in the last chunk. Of `LLM.stream_chat`: content, reasoning: the parts of the
    text that are the answer and thoughts; tool calls are in the final Completion.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[Mapping[int, float], ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    content: str = ""
    reasoning: str = ""


def completion(request: Request, *others: Request, new_receipt: NewReceipt | None = None) -> Completion:
    """The Completion of a request that has ended. others: the further samples of the same prompt. new_receipt: makes
    the receipt of a sample, given its number."""
    assert request.finish_reason is not None, "the request has not ended"
    return Completion(
        text=request.text,
        token_ids=list(request.output_ids),
        logprobs=list(request.logprobs),
        finish_reason=request.finish_reason,
        prompt_token_ids=list(request.prompt_ids),
        top_logprobs=list(request.top_logprobs),
        prompt_logprobs=list(request.prompt_logprobs),
        prompt_top_logprobs=list(request.prompt_top_logprobs),
        stop_reason=request.stop_reason,
        error=request.error,
        others=[completion(other, new_receipt=_after(new_receipt, number)) for number, other in enumerate(others, 1)],
        content=request.text,
        receipt=new_receipt and new_receipt(request, 0),
    )


def _after(new_receipt: NewReceipt | None, number: int) -> NewReceipt | None:
    """What makes the receipt of sample `number`, as if it were the first."""
    return new_receipt and (lambda request, _: new_receipt(request, number))


class Stream:
    """The text of a request that its caller runs, step by step: `text` is all of it so far, `new_text` what the last
    `advance` added.

    Text only grows: no character is taken back. The request itself, with its token ids, is `request`.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.text, self.new_text = request, "", ""

    def advance(self) -> None:
        """Updates `text` and `new_text` with what the engine has generated since the last call."""
        self.new_text = self.request.text[len(self.text) :]
        self.text += self.new_text


class CompletionStream:
    """The answer to one prompt while it is generated: an iterator of CompletionChunks. Tokens from which the answer
    goes on (output_ids) are in none of them.

    `completion` is all of the answer once it has ended. Leaving a `for` loop over the stream, `close`, the end of a
    `with` block and the end of the stream's last reference cancel the request, if it has not ended. request: the
    engine's.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        new_parser: Callable[[], Parser] | None = None,
        new_receipt: NewReceipt | None = None,
    ) -> None:
        self._engine, self.request, self._new_parser, self._new_receipt = engine, request, new_parser, new_receipt
        self._parser = new_parser() if new_parser is not None else None
        # what the caller knows already, where the answer goes on from tokens
        self._num_tokens, self._num_chars, self._has_ended = request.num_given, request.num_given_characters, False
        if self._parser is not None:
            self._parser.push(request.text[: self._num_chars])
        self._cancel = weakref.finalize(self, engine.cancel, request)
        self._cancel.atexit = False  # then the engine ends, too

    def __iter__(self) -> Iterator[CompletionChunk]:
        """A generator, which a loop that is left early closes."""
        try:
            while (chunk := self._next()) is not None:
                yield chunk
        finally:
            self.close()

    def __next__(self) -> CompletionChunk:
        chunk = self._next()
        if chunk is None:
            raise StopIteration
        return chunk

    def _next(self) -> CompletionChunk | None:
        """The next chunk: of one token, or of several, where drafts were right or another call has run the engine's
        steps, which it may do even now: the finish_reason comes last, a token after its log-probabilities. None after
        the last."""
        request = self.request
        with held_interrupts() as interrupt:
            while len(request.output_ids) == self._num_tokens and request.finish_reason is None:
                self._engine.step()
                interrupt()
        if self._has_ended or request.finish_reason == "cancelled":
            return None
        self._has_ended = request.finish_reason is not None
        text, first, end = request.text[self._num_chars :], self._num_tokens, len(request.output_ids)
        is_known = first == request.num_given == end > 0 and request.error is None
        self._num_chars, self._num_tokens = self._num_chars + len(text), end
        content, reasoning = ("", "") if is_known else self._parts(text)
        return CompletionChunk(
            text,
            tuple(request.output_ids[first:end]),
            tuple(request.logprobs[first:end]),
            tuple(request.top_logprobs[first:end]),
            self.completion.finish_reason if self._has_ended else None,
            request.stop_reason if self._has_ended else None,
            content,
            reasoning,
        )

    def _parts(self, text: str) -> tuple[str, str]:
        """The content and the thoughts in a piece of text."""
        if self._parser is None:
            return text, ""
        events = self._parser.push(text)
        if self._has_ended:
            events += self._parser.finish(self.request.finish_reason in CUT)
        return joined(events, Content), joined(events, Reasoning)

    @functools.cached_property
    def completion(self) -> Completion:
        """All of the answer; with finish_reason "cancelled" what there is of it. ValueError before its end."""
        if self.request.finish_reason is None:
            raise ValueError("the answer goes on; read its stream to the end, or close it")
        made = completion(self.request, new_receipt=self._new_receipt)
        return made if self._new_parser is None else parse_answer(made, self._new_parser)

    def close(self) -> None:
        """Cancels the request, if it has not ended. Its tokens so far are in `completion`."""
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CompletionStream cannot be copied or pickled; its chunks and its completion can")

    def __repr__(self) -> str:
        """How far the answer is."""
        state = self.request.finish_reason or "running"
        return f"CompletionStream({state}, {len(self.request.output_ids)} tokens, {self.request.text[-40:]!r})"


# ------------------------------------------------------------ thoughts and tool calls


def parse_answer(answer: Completion, new_parser: Callable[[], Parser]) -> Completion:
    """The answer, and the other samples, with the thoughts, content and tool calls that a parser finds in each text."""
    parser = new_parser()
    events = parser.push(answer.text) + parser.finish(answer.finish_reason in CUT)
    calls = _complete_calls(events)
    return replace(
        answer,
        others=[parse_answer(other, new_parser) for other in answer.others],
        finish_reason=finish_reason(answer.finish_reason, len(calls)),
        content=joined(events, Content),
        reasoning=joined(events, Reasoning),
        tool_calls=calls,
    )


def joined(events: Sequence[Event], kind: type[Content] | type[Reasoning]) -> str:
    """The text of the events of one kind."""
    return "".join(event.text for event in events if isinstance(event, kind))


def _complete_calls(events: Sequence[Event]) -> list[ToolCall]:
    """The calls among events, without one in whose arguments the answer ended: it asks for nothing yet."""
    calls: dict[int, ToolCall] = {}
    for event in events:
        if isinstance(event, CallStart):
            calls[event.index] = ToolCall(event.id, event.name, "")
        elif isinstance(event, Arguments):
            call = calls[event.index]
            calls[event.index] = replace(call, arguments=call.arguments + event.text)
    cut = {event.index for event in events if isinstance(event, Arguments) and event.is_cut}
    return [call for index, call in calls.items() if index not in cut and _is_json(call.arguments)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# ------------------------------------------------------------ many prompts


class Starts(Protocol):
    """What starts requests: an `LLM`."""

    engine: Engine

    def start_samples(
        self,
        prompt: Prompt,
        params: SamplingParams,
        prediction: Prompt | None = None,
        output_ids: Any = None,
        *,
        receipt: bool = False,
    ) -> list[Stream]:
        """Queues the samples of a prompt."""
        ...


def run_all(
    llm: Starts,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    predictions: Sequence[Any],
    output_ids: Sequence[Any],
    progress: bool | OnProgress | None = None,
    kind: str = "generating",
    *,
    receipt: bool = False,
) -> list[list[Stream]]:
    """Runs every prompt's samples to their end and returns their Streams; runs nothing if one prompt is refused. An
    exception, such as Ctrl-C, cancels the requests that have not ended.

    progress: see LLM; of a single answer there is none. kind: of work, for progress. receipt: see `Engine.make`.
    """
    started: list[list[Stream]] = []
    with held_interrupts() as interrupt:
        try:
            for arguments in zip(prompts, params, predictions, output_ids, strict=True):
                started.append(llm.start_samples(*arguments, receipt=receipt))
                interrupt()
            streams = [stream for samples in started for stream in samples]
            run = Run(llm.engine, streams, interrupt)
            with reporting(progress if len(streams) > 1 else None, run.speed) as report:
                run.all(kind, report)
        finally:
            for stream in itertools.chain(*started):
                llm.engine.cancel(stream.request)
    return started


def run_made(engine: Engine, requests: Sequence[Request]) -> None:
    """Queues requests that an engine has made, and runs steps until they have ended. An exception, such as Ctrl-C,
    cancels them."""
    with held_interrupts() as interrupt:
        try:
            engine.queue(*requests)
            Run(engine, [Stream(request) for request in requests], interrupt).all("running", None)
        finally:
            for request in requests:
                engine.cancel(request)


class Run:
    """Requests that run together, and how many of them have ended. interrupt: called after each step."""

    def __init__(self, engine: Engine, streams: Sequence[Stream], interrupt: Callable[[], None]) -> None:
        self._engine, self._streams, self._interrupt = engine, streams, interrupt
        self._left = {stream.request.id for stream in streams}
        self._began, self._generated = time.perf_counter(), engine.num_generated
        self._num_prompt = 0  # tokens of prompts that were computed for requests that have ended

    def all(self, kind: str, report: OnProgress | None) -> None:
        """Runs steps until all have ended."""
        if report is not None:
            report(kind, 0, len(self._streams))
        for stream in self._streams:
            while stream.request.finish_reason is None:
                self._note(self._engine.step(), kind, report)
                self._interrupt()
            self._note([stream.request], kind, report)  # another call's steps may have ended it
            stream.advance()

    def _note(self, changed: Sequence[Request], kind: str, report: OnProgress | None) -> None:
        if report is None:
            return
        if ended := [each for each in changed if each.finish_reason is not None and each.id in self._left]:
            self._left.difference_update(request.id for request in ended)
            self._num_prompt += sum(len(request.prompt_ids) - request.num_cached for request in ended)
            report(kind, len(self._streams) - len(self._left), len(self._streams))

    def speed(self) -> str:
        """Computed tokens per second so far, in words. Tokens that were in the prefix cache are not computed."""
        num_tokens = self._num_prompt + self._engine.num_generated - self._generated
        return f"{num_tokens / max(1e-9, time.perf_counter() - self._began):,.0f} tokens/s"
