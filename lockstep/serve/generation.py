"""One HTTP request that generates, from its admission to the end of its answer."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from lockstep.engine.async_engine import Token, TokenStream, batches
from lockstep.engine.request import Request
from lockstep.serve.answer_size import Prompts, num_logprobs, within
from lockstep.serve.errors import ApiError, check_most, not_allowed, not_generated, wrong_field
from lockstep.serve.fields import body

if TYPE_CHECKING:
    from lockstep.serve.service import Service

T = TypeVar("T")
F = TypeVar("F", bound=body.Fields)
Found = tuple[int, list[Token], str | None]  # a number of a sequence, its new tokens and its finish_reason

SHORT_BYTES = 2048  # of a body
FRAME_SECONDS = 1 / 60  # nobody sees tokens that come faster than this one by one
EVENT_SECONDS = 1e-3  # between events of all streams together


class Job:
    """A request in work: its body, its sequences in the engine, and what ends it early.

    The order of use: `read`, then `start`, then `tokens` (or `finished`) until all sequences have ended. A client that
    leaves, the time limit and the end of the server cancel the sequences, wherever they are, and make the next of these
    calls raise. model_name: what the answer calls the model, from `read` on. requests: the engine's, one for each
    sequence, with what is known of it.
    """

    def __init__(self, service: "Service", scope: Scope, receive: Receive) -> None:
        self.service, self.scope, self._receive = service, scope, receive
        self.streams: list[TokenStream] = []
        self.requests: list[Request] = []
        self._prompts: Prompts = []
        self._narrowing: Sequence[str] = ()
        self.model_name = service.model_name
        self.num_sequences, self.num_queued_tokens, self.num_logprobs = 1, 0, 0
        self._ended_by: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._began, self._is_short = time.monotonic(), False
        self._last_tokens: float | None = None

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.monotonic() - self._began

    # ------------------------------------------------------------ the request

    async def read(self, fields: type[F]) -> F:
        """The body, checked against a model of its fields, of which one is `model`. From then on the socket is watched.

        ApiError 404 for a model that is not here.
        """
        raw = await body.read(self._receive, self.service.limits.body_seconds)
        self._is_short = len(raw) <= SHORT_BYTES
        self._watcher = asyncio.create_task(self._watch())
        made = await body.checked(self.service, fields, raw)
        self.model_name = self.service.name_in_answers(made.model)
        return made

    async def offload(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function in a worker thread, see `Service.offload`; raises if the request ended meanwhile."""
        made = await self.service.offload(function, *args)
        self.go_on()
        return made

    async def prepare(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function whose time is in proportion to the body: at once where that is short, else as `offload`.

        A hop to a thread and back costs as much as generating a few tokens.
        """
        if not self._is_short:
            return await self.offload(function, *args)
        try:
            return function(*args)
        except ValueError as error:
            raise not_allowed(error) from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(ClientDisconnect())

    # ------------------------------------------------------------ its answer

    async def start(
        self,
        prompts: Prompts,
        cache_salt: str = "",
        narrowing: Sequence[str] = (),
        prediction: Sequence[int] = (),
    ) -> list[Request]:
        """Queues all samples of [(token ids, SamplingParams), ...] in order; returns the engine's Requests.

        narrowing: fields that may leave an answer without a token to choose, see `token_masks.narrowing`. prediction:
        token ids that each answer may be like.
        ApiError 400 for what cannot run, 429 where it would have to wait behind too much.
        """
        num_sequences = sum(params.n for _, params in prompts)
        check_most("prompt", len(prompts), self.service.limits.max_prompts, "prompts")
        check_most("n", num_sequences, self.service.limits.max_sequences, "samples of all prompts together")
        for ids, params in prompts:
            self._check_context(len(ids), params.max_tokens)
        prompts = within(prompts, self.service.limits.max_answer_values, self.service.max_context)
        self.service.admit(
            self, num_sequences, sum(len(ids) * params.n for ids, params in prompts), num_logprobs(prompts)
        )
        self._prompts, self._narrowing = prompts, narrowing
        salt = self.service.salt(self.scope["lockstep.tenant"], cache_salt)
        await self.prepare(self._submit, prompts, dict(cache_salt=salt, prediction=prediction))
        return self.requests

    def _submit(self, prompts: Prompts, options: dict[str, Any]) -> None:
        engine = self.service.engine
        assert engine is not None, "requests are admitted from `open` on"
        self.streams = engine.submit_all(prompts, **options)
        self.requests = [stream.request for stream in self.streams]
        if self._ended_by is not None:  # while they were being prepared
            self._cancel()

    def _check_context(self, num_prompt: int, max_tokens: int) -> None:
        limit = self.service.max_context
        if num_prompt + max_tokens > limit:  # the routes ask for no more than there is room for, and for one at least
            raise wrong_field(
                "prompt",
                f"it has {num_prompt} tokens, which leaves no room for an answer in the context of {limit} tokens",
                "context_length_exceeded",
            )

    async def tokens(self, pause: Callable[[], float] | None = None) -> AsyncIterator[list[Found]]:
        """Yields lists of (number of a sequence, its new Tokens, its finish_reason) whenever a step brought some.

        Tokens that come within `pause()` seconds come together, by default as long as nobody sees a difference.
        finish_reason is None before a sequence's last tokens. A sequence that failed raises ApiError at the end: 400,
        or 500 where the fault is the model's.
        """
        async for found in batches(self.streams, pause or self._frame):
            self.go_on()
            self._note(found)
            yield found
        self.go_on()
        self._check_errors()
        self.service.metrics.whole_answer.add(self.seconds)

    def _frame(self) -> float:
        """Seconds between two events of a stream: longer where there are many, since each costs several tokens."""
        return max(FRAME_SECONDS, EVENT_SECONDS * self.service.num_open)

    async def finished(self) -> list[Request]:
        """Waits for the end of all sequences; returns their Requests."""
        async for _ in self.tokens(pause=lambda: math.inf):
            pass
        return self.requests

    def _note(self, found: list[Found]) -> None:
        """Metrics of a step's tokens; with the first of them the prompts no longer wait."""
        now, metrics = time.monotonic(), self.service.metrics
        count = sum(len(tokens) for _, tokens, _ in found)
        metrics.generated_tokens += count
        if self._last_tokens is None:
            metrics.first_token.add(now - self._began)
            metrics.prompt_tokens += sum(len(ids) for ids, _ in self._prompts)
            self.service.num_queued_tokens -= self.num_queued_tokens
            self.num_queued_tokens = 0
        else:
            metrics.between_tokens.add((now - self._last_tokens) * len(found) / count, count)
        self._last_tokens = now

    def _check_errors(self) -> None:
        failed = [request for request in self.requests if request.finish_reason == "error"]
        faulty = next((request for request in failed if request.is_fault), None)
        self.service.note_end(faulty is not None)
        if faulty is not None:
            raise ApiError(500, str(faulty.error), code="not_finite")  # whoever asks: the engine says why
        if failed:
            raise not_generated(failed[0], self._narrowing)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object: each prompt counts once, however many samples it has."""
        num_prompt = sum(len(ids) for ids, _ in self._prompts)
        num_output = sum(len(request.output_ids) for request in self.requests)
        cached, first = 0, 0
        for _, params in self._prompts:
            cached += self.requests[first].num_cached
            first += params.n
        drafted = sum(request.num_drafted for request in self.requests)
        accepted = sum(request.num_accepted for request in self.requests)
        guessed = dict(accepted_prediction_tokens=accepted, rejected_prediction_tokens=drafted - accepted)
        return dict(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=dict(cached_tokens=cached),
            **(dict(completion_tokens_details=guessed) if drafted else {}),
        )

    # ------------------------------------------------------------ its end

    def explain(self, error: BaseException) -> ApiError:
        """Any exception as the ApiError that the client may see."""
        return self.service.explain(error)

    def end(self, reason: Exception) -> None:
        """Cancels all sequences; the handler meets the exception `reason` at its next step."""
        if self._ended_by is None:
            self._ended_by = reason
            self._cancel()

    def _cancel(self) -> None:
        for stream in self.streams:
            if stream.request.finish_reason is None:
                stream.leave()

    def go_on(self) -> None:
        """Raises what ended the request early, if something did."""
        if self._ended_by is not None:
            raise self._ended_by

    def __enter__(self) -> Self:
        self.service.enter(self)
        limit = self.service.limits.request_seconds
        too_long = ApiError(504, f"the answer took more than {limit:g} s", code="timeout")
        self._timer = asyncio.get_running_loop().call_later(limit, self.end, too_long)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        self.end(ClientDisconnect())
        self.service.leave(self)


class Generates:
    """The ASGI endpoint of a handler: `await handler(job)` returns an ASGI response, such as a Response or EventStream.

    Admits the request, and ends all that it started, whether its answer was complete or not.
    """

    def __init__(self, service: "Service", handler: Callable[[Job], Awaitable[ASGIApp]]) -> None:
        self._service, self._handler = service, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.check_open()
        with Job(self._service, scope, receive) as job:
            response = await self._handler(job)
            await response(scope, receive, send)
