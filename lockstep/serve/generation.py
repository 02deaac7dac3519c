"""One HTTP request that generates tokens, from its admission to the end of its answer."""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from lockstep.engine.request import Request
from lockstep.engine.token_stream import Pause, Token, TokenStream, batches, until_the_end
from lockstep.receipts.receipt import ReceiptOptions
from lockstep.serve.answer_size import Prompts, fit_answers, num_logprobs
from lockstep.serve.continuation import ANEW, Continuation, refusing
from lockstep.serve.errors import ApiError, check_most, not_allowed, not_generated, wrong_field
from lockstep.serve.fields import body
from lockstep.serve.fields.receipt import receipt_options
from lockstep.serve.fields.sampling import SamplingFields
from lockstep.serve.fields.seed import Seeds, common_seed, has_seed, seed_of_key, sent_key
from lockstep.serve.receipts.desk import Receipts
from lockstep.serve.request_log import Work

if TYPE_CHECKING:
    from lockstep.serve.exchange import Exchange
    from lockstep.serve.service import Service

T = TypeVar("T")
F = TypeVar("F", bound=body.Fields)
SequenceTokens = tuple[int, list[Token], str | None]  # the number of a sequence, its new tokens, its finish_reason

PRIORITY_KEY = "lockstep.priority"  # a key of the scope of a batch's line: its priority for the engine
SHORT_BYTES = 2048  # bodies up to here are prepared on the event loop
FRAME_SECONDS = 1 / 60  # between events of a stream: readers cannot see more
LONG_TOKENS = 2048  # of prompt and answer: a receipt of more takes over 3 ms to make
FAST_TOKENS = 12  # of an event: those that come so fast are read later
LONGEST_FRAME_SECONDS = 0.1  # for events of FAST_TOKENS
EVENT_SECONDS = 1.5e-3  # between events of all streams together: each takes 0.05 ms


def frame_seconds(num_open: int, num_tokens: int) -> float:
    """Seconds between two events of a stream: longer with many streams, as an event takes the time of several tokens,
    and longer still where nobody reads along. num_open: the number of requests that are being answered; num_tokens: how
    many tokens the last event of a stream had."""
    longer = min(2 * EVENT_SECONDS * num_open, LONGEST_FRAME_SECONDS) if num_tokens >= FAST_TOKENS else 0.0
    return max(FRAME_SECONDS, EVENT_SECONDS * num_open, longer)


class Generation:
    """A running request: its body, its sequences in the engine, and the exception that ends it early, if any.

    The order of use: `read`, then `start`, then `tokens` (or `finished`) until all sequences have ended. When the
    client disconnects, the time limit passes or the server ends, the sequences are cancelled and the next of these
    calls raises. exchange: its side of HTTP. model_name: the model's name in the answer, from `read` on. seed: with
    which the same request is answered the same, once it is admitted (see `common_seed`). requests: the engine's
    Requests, one for each sequence.
    """

    def __init__(self, service: "Service", scope: Scope, receive: Receive) -> None:
        self.service, self.scope, self._receive = service, scope, receive
        self.streams: list[TokenStream] = []
        self.requests: list[Request] = []
        self._prompts: Prompts = []
        self._receipts: Receipts | None = None
        self._seeds: Seeds | None = None
        self.seed: int | None = None
        self._num_ended = 0
        self._narrowing: Sequence[str] = ()
        self.model_name = service.model_name
        self.num_sequences, self.num_queued_tokens, self.num_logprobs = 1, 0, 0
        self._ended_by: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.exchange: Exchange = scope["lockstep.exchange"]
        self.exchange.generation, self._has_short_body = self, False
        self._submitted, self._ended = math.inf, math.inf
        self._first_tokens: float | None = None
        self._last_tokens, self._num_first = 0.0, 0  # number: of the tokens that came first

    # ------------------------------------------------------------ the request

    async def read(self, fields: type[F]) -> F:
        """The body as an object of the class `fields`, which has a field `model`.

        Watches for a disconnect from then on. ApiError 400 for a wrong body, 404 for an unknown model.
        """
        raw = await body.read_body(self._receive, self.service.limits.body_seconds)
        self._has_short_body = len(raw) <= SHORT_BYTES
        self._watcher = asyncio.create_task(self._watch())
        made = await body.parse_and_check_async(self.service, fields, raw)
        self.model_name = self.service.name_in_answers(made.model)
        await self._ask(made, raw)
        return made

    async def _ask(self, fields: Any, raw: bytes) -> None:
        """Notes what a request for an answer asks for besides it: a receipt, and a seed. ApiError 400 for an
        Idempotency-Key that is none."""
        if not isinstance(fields, SamplingFields):
            return
        options = await self._ask_receipts(fields)
        key, is_given = sent_key(self.scope), has_seed(fields.seed)
        needs_key = key is not None and not is_given
        of_key = await self.prepare(seed_of_key, key, self.scope["lockstep.tenant"], raw) if needs_key else None
        self._seeds = Seeds(is_given, options and options.nonce, of_key)

    async def _ask_receipts(self, fields: SamplingFields) -> ReceiptOptions | None:
        """Notes whether the answers get receipts; returns what is asked for. ApiError 503 as long as the model's
        content hash is not known."""
        desk, path = self.service.receipts, self.scope["path"]
        options = receipt_options(fields, path, desk.key)
        if options is not None or desk.keeps_all:
            self.service.check_content()
            self._receipts = Receipts(desk, options, path)
            if not desk.knows_model:
                await self.offload(desk.model)
        return options

    async def offload(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function in a worker thread (`Service.offload`); raises if the request has ended meanwhile."""
        made = await self.service.offload(function, *args)
        self.raise_if_ended()
        return made

    async def prepare(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function whose time grows with the body: at once for a short body, else as `offload` does.

        A hop to a thread and back costs as much as generating a few tokens.
        """
        if not self._has_short_body:
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
        continuation: Continuation = ANEW,
    ) -> list[Request]:
        """Queues all samples of [(token ids, SamplingParams), ...] in order; returns the engine's Requests.

        narrowing: names of the request's fields that may leave no allowed token, for error messages (see
        `token_masks.narrowing_fields`). prediction: token ids that each answer is expected to resemble. continuation:
        how the answers begin.
        ApiError 400 for prompts that can never run, 429 where too many sequences or tokens wait already.
        """
        num_sequences = sum(params.n for _, params in prompts)
        check_most("prompt", len(prompts), self.service.limits.max_prompts, "prompts")
        check_most("n", num_sequences, self.service.limits.max_sequences, "samples of all prompts together")
        for ids, params in prompts:
            self._check_context(len(ids), params.max_tokens)
        prompts = fit_answers(prompts, self.service.limits.max_answer_values, self.service.max_context)
        if self._seeds is not None:
            prompts = self._seeds.put_into(prompts)
        num_tokens = sum(len(ids) * params.n for ids, params in prompts) + continuation.num_tokens
        self.service.admit(self, num_sequences, num_tokens, num_logprobs(prompts))
        self._prompts, self._narrowing, self._submitted = prompts, narrowing, time.monotonic()
        salt = self.service.salt(self.scope["lockstep.tenant"], cache_salt)
        options: dict[str, Any] = dict(
            cache_salt=salt,
            prediction=prediction,
            receipt=self._receipts is not None,
            priority=self.scope.get(PRIORITY_KEY, 0),
        )
        if continuation.output_ids:  # grammars and stop sequences read all of these tokens
            await self.offload(refusing, narrowing, self._submit, prompts, options | continuation._asdict())
        else:
            await self.prepare(self._submit, prompts, options)
        self.seed = None if self._seeds is None else common_seed(prompts)
        return self.requests

    async def run(self, request: Request) -> None:
        """Runs a request that the engine has made, and that chooses no tokens, to its end. ApiError 429 where too many
        wait already."""
        self.service.admit(self, 1, len(request.prompt_ids))
        self._prompts, self._submitted = [(request.prompt_ids, request.params)], time.monotonic()
        await self.offload(self._submit_made, request)
        async for _ in batches(self.streams, until_the_end):
            self.raise_if_ended()
        self.raise_if_ended()
        self._ended = time.monotonic()

    def _submit_made(self, request: Request) -> None:
        assert self.service.engine is not None, "requests are admitted from `open` on"
        self.streams = self.service.engine.submit_made([request])
        self.requests = [request]
        if self._ended_by is not None:
            self._cancel()

    def _submit(self, prompts: Prompts, options: dict[str, Any]) -> None:
        engine = self.service.engine
        assert engine is not None, "requests are admitted from `open` on"
        self.streams = engine.submit_all(prompts, **options)
        self.requests = [stream.request for stream in self.streams]
        if self._ended_by is not None:  # the request ended while its sequences were submitted
            self._cancel()

    def _check_context(self, num_prompt: int, max_tokens: int) -> None:
        limit = self.service.max_context
        if num_prompt + max_tokens > limit:  # routes cut max_tokens to the room, but never below one token
            raise wrong_field(
                "prompt",
                f"it has {num_prompt} tokens, which leaves no room for an answer in the context of {limit} tokens",
                "context_length_exceeded",
            )

    async def tokens(self, pause: Pause | None = None) -> AsyncIterator[list[SequenceTokens]]:
        """Yields lists of (number of a sequence, its new Tokens, its finish_reason) as steps of the engine give tokens.

        Tokens of a `pause` come in one list, by default those of a frame, which is too short to be seen.
        finish_reason is None before a sequence's last tokens. A sequence that failed raises ApiError at the end: 400,
        or 500 where the model's logits were not finite.
        """
        async for found in batches(self.streams, pause or self.service.frames):
            self.raise_if_ended()
            self._count_tokens(found)
            if self._receipts is not None:
                await self._make_large_receipts(found, self._receipts)
                await self._keep_receipts(found, self._receipts)
            yield found
        self.raise_if_ended()
        self._ended = time.monotonic()
        self._check_errors()
        self.service.metrics.whole_answer.add(self.exchange.seconds)

    async def _make_large_receipts(self, found: list[SequenceTokens], receipts: Receipts) -> None:
        """Makes the receipts of long answers that have ended in a worker thread, where it delays no other answer."""
        for number, _, reason in found:
            request = self.requests[number]
            if reason is not None and len(request.prompt_ids) + len(request.output_ids) > LONG_TOKENS:
                await self.offload(receipts.make, number, request, self._prompts)

    async def _keep_receipts(self, found: list[SequenceTokens], receipts: Receipts) -> None:
        """Keeps the receipts of all answers, once all have ended, where the server does so: a client that has seen the
        end of its answer may leave."""
        self._num_ended += sum(reason is not None for _, _, reason in found)
        has_failed = any(request.finish_reason == "error" for request in self.requests)
        if self._num_ended == len(self.requests) and not has_failed and self.service.receipts.keeps_all:
            await self.offload(receipts.keep, self.requests, self._prompts)

    async def finished(self) -> list[Request]:
        """Waits for the end of all sequences; returns their Requests."""
        async for _ in self.tokens(until_the_end):
            pass
        return self.requests

    def _count_tokens(self, found: list[SequenceTokens]) -> None:
        """Adds a step's tokens to the metrics; from the first tokens on the prompts no longer count as queued."""
        now, metrics = time.monotonic(), self.service.metrics
        num_tokens = sum([len(tokens) for _, tokens, _ in found])
        if not num_tokens:  # the tokens with which an answer begins end it
            return
        metrics.generated_tokens += num_tokens
        if self._first_tokens is None:
            self._first_tokens, self._num_first = now, num_tokens
            metrics.first_token.add(now - self.exchange.began)
            self.count_prompts()
            self.service.num_queued_tokens -= self.num_queued_tokens
            self.num_queued_tokens = 0
        else:
            metrics.between_tokens.add((now - self._last_tokens) * len(found) / num_tokens, num_tokens)
        self._last_tokens = now

    def count_prompts(self) -> None:
        """Adds the prompts' tokens to the metrics, once they are computed."""
        self.service.metrics.prompt_tokens += self.num_prompt
        self.service.metrics.cached_tokens += self.num_cached

    def _check_errors(self) -> None:
        failed = [request for request in self.requests if request.finish_reason == "error"]
        faulty = next((request for request in failed if request.is_fault), None)
        self.service.note_end(faulty is not None)
        if faulty is not None:
            raise ApiError(500, str(faulty.error), code="not_finite")
        if failed:
            raise not_generated(failed[0], self._narrowing)

    @property
    def num_prompt(self) -> int:
        """Tokens of all prompts. A prompt counts once, whatever its number of samples."""
        return sum(len(ids) for ids, _ in self._prompts)

    @property
    def num_cached(self) -> int:
        """Of num_prompt, those that the prefix cache had for the first sample of each prompt."""
        firsts = itertools.accumulate((params.n for _, params in self._prompts[:-1]), initial=0)
        return sum(self.requests[first].num_cached for first in firsts)

    @property
    def num_generated(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(request.output_ids) for request in self.requests)

    def work(self) -> Work | None:
        """What the engine has done so far; None where it was given nothing to do."""
        if not self.requests:
            return None
        now, first = time.monotonic(), self._first_tokens
        admitted = [request.admitted for request in self.requests if request.admitted is not None]
        begun, computed = min(admitted, default=now), min(self._ended, first or math.inf)
        is_prefilled = len(self._prompts) == 1 and computed < math.inf
        num_generated, num_given = self.num_generated, sum(request.num_given for request in self.requests)
        return Work(
            num_prompt=self.num_prompt,
            num_cached=self.num_cached,
            num_generated=num_generated,
            queue_seconds=max(0.0, begun - self._submitted),
            first_seconds=None if first is None else first - self.exchange.began,
            prefill=(self.num_prompt - self.num_cached + num_given, computed - begun) if is_prefilled else None,
            decode=None if first is None else (num_generated - num_given - self._num_first, self._last_tokens - first),
        )

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        num_prompt, num_output = self.num_prompt, self.num_generated
        drafted = sum(request.num_drafted for request in self.requests)
        accepted = sum(request.num_accepted for request in self.requests)
        drafts = dict(accepted_prediction_tokens=accepted, rejected_prediction_tokens=drafted - accepted)
        return dict(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=dict(cached_tokens=self.num_cached),
            **(dict(completion_tokens_details=drafts) if drafted else {}),
        )

    def receipt(self, number: int) -> dict[str, Any]:
        """The fields of sequence `number`'s answer that have its receipt, once it has ended; none where none was asked
        for."""
        if self._receipts is None:
            return {}
        return self._receipts.fields(number, self.requests[number], self._prompts)

    # ------------------------------------------------------------ its end

    def explain(self, error: BaseException) -> ApiError:
        """Any exception as the ApiError that the client may see, as which the request has ended."""
        return self.exchange.failed(error)

    def end(self, reason: Exception) -> None:
        """Cancels all sequences; the handler's next call of a method here raises `reason`."""
        if self._ended_by is None:
            self._ended_by = reason
            self._cancel()

    def _cancel(self) -> None:
        for stream in self.streams:
            if stream.request.finish_reason is None:
                stream.leave()

    def raise_if_ended(self) -> None:
        """Raises the exception that ended the request early, if there is one."""
        if self._ended_by is not None:
            raise self._ended_by

    def __enter__(self) -> Self:
        self.service.enter(self)
        limit = self.service.limits.request_seconds
        too_long = ApiError(504, f"the answer took more than {limit:g} s", code="timeout")
        if PRIORITY_KEY not in self.scope:  # lines of a batch wait as long as they must
            self._timer = asyncio.get_running_loop().call_later(limit, self.end, too_long)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        self.end(ClientDisconnect())
        self.service.leave(self)


class GenerationEndpoint:
    """The ASGI endpoint of a handler: `await handler(generation)` returns an ASGI response, such as an EventStream.

    Checks that the service is open, and cancels all sequences that are left when the response ends.
    """

    def __init__(self, service: "Service", handler: Callable[[Generation], Awaitable[ASGIApp]]) -> None:
        self._service, self.handler = service, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.check_open()
        with Generation(self._service, scope, receive) as generation:
            response = await self.handler(generation)
            await response(scope, receive, send)
