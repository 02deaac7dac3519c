"""An Engine in a thread of its own: any thread or event loop submits requests and reads their tokens as they come."""

import asyncio
import contextlib
import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

from lockstep.engine.engine import Engine
from lockstep.engine.request import Request, SamplingParams, check_single

SWITCH_SECONDS = 5e-5  # until a busy Python thread hands over; the default of 5 ms would delay every step
Woken = asyncio.Future[None]  # a reader awaits it; the engine's thread sets it


class EngineStopped(RuntimeError):
    """The engine ended before the request: it was closed, or a step failed (then the step's error is the cause)."""


class Token(NamedTuple):
    """One token of an answer. index: its place in the answer. top_logprobs: the likeliest alternatives, if they were
    asked for. text: the characters that became certain with this token (tokens may share a character, and characters
    that may begin a stop sequence are held back)."""

    index: int
    id: int
    logprob: float
    top_logprobs: dict[int, float] | None
    text: str


class TokenStream:
    """The tokens of one request, for one reader: `for token in stream` or `async for token in stream`. Leaving such a
    loop early cancels the request. Tokens with which the request began (`Engine.make`, output_ids), and their text, are
    not among them.

    After the last token `finish_reason` says why the stream ended, and `request` has everything else about the answer.
    Reading raises EngineStopped if the engine ends first.
    """

    def __init__(self, engine: "AsyncEngine", request: Request) -> None:
        self.request, self._engine = request, engine
        self._tokens: deque[Token] = deque()
        self._ready, self._for_end, self._ended, self._left = threading.Condition(), False, False, False
        self._waiting: Woken | None = None
        self._error: BaseException | None = None
        self._num_sent, self._text_sent = request.num_given, request.num_given_characters
        self._has_untold_end = False  # whether it ended without a token that could bear the finish_reason

    def __repr__(self) -> str:
        """How far the answer is."""
        return f"TokenStream({self.finish_reason or 'running'}, {len(self.request.output_ids)} tokens)"

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "embedded", "error" or "cancelled"; None while the request runs."""
        return self.request.finish_reason if self._ended else None

    @property
    def is_read(self) -> bool:
        """Whether the stream has ended and all its tokens are read."""
        with self._ready:
            return self._ended and not self._tokens

    def cancel(self) -> None:
        """Ends the request before the engine's next step. Any thread may call this, at any time."""
        self._engine.send("cancel", self)

    def leave(self) -> None:
        """Cancels the request and ends the stream for its reader at once, even if the engine's step never returns."""
        self.cancel()
        with self._ready:
            self._left = self._ended = True
            woken = self._woken()
        _wake([woken])

    # ------------------------------------------------------------ the reader's side

    def __iter__(self) -> Iterator[Token]:
        try:
            while True:
                try:
                    token = self.__next__()
                except StopIteration:
                    return
                yield token
        finally:
            self._cancel_unless_ended()

    def __next__(self) -> Token:
        with self._ready:
            self._ready.wait_for(lambda: self._tokens or self._ended)
            return self._next(StopIteration)

    async def __aiter__(self) -> AsyncIterator[Token]:
        try:
            while True:
                try:
                    token = await self.__anext__()
                except StopAsyncIteration:
                    return
                yield token
        finally:
            self._cancel_unless_ended()

    def _cancel_unless_ended(self) -> None:
        if not self._ended:
            self.cancel()

    async def __anext__(self) -> Token:
        while True:
            woken = asyncio.get_running_loop().create_future()
            with self._ready:
                if self._tokens or self._ended:
                    return self._next(StopAsyncIteration)
                self._waiting, self._for_end = woken, False
            await woken

    def take(self, woken: Woken) -> list[Token] | None:
        """All tokens that have come; None after the last one. If the list is empty, the future `woken` is set when
        tokens come, or the stream has ended without a token (then `is_read`)."""
        with self._ready:
            if not self._tokens and self._ended:
                self._check()
                has_untold_end, self._has_untold_end = self._has_untold_end, False
                return [] if has_untold_end else None
            if not self._tokens:
                self._waiting, self._for_end = woken, False
            taken = list(self._tokens)
            self._tokens.clear()
            return taken

    def wait_for_end(self, woken: Woken) -> bool:
        """Has the future `woken` set when the stream ends. Returns True, and does not set it, if the stream has
        ended."""
        with self._ready:
            self._waiting, self._for_end = woken, True
            return self._ended

    def _next(self, end: type[Exception]) -> Token:
        if self._tokens:
            return self._tokens.popleft()
        self._check()
        raise end

    def _check(self) -> None:
        if self._error is not None:
            raise EngineStopped(str(self._error)) from self._error

    # ------------------------------------------------------------ the engine's side

    def advance(self) -> Woken | None:
        """Hands over the tokens that the request got since the last call; returns the future that its reader awaits, or
        None."""
        request, count = self.request, len(self.request.output_ids)
        text = request.answer.text if request.answer is not None else ""
        with self._ready:
            for i in range(self._num_sent, count):
                top = request.top_logprobs[i] if request.top_logprobs else None
                new_text = text[self._text_sent :] if i == count - 1 else ""
                self._tokens.append(Token(i, request.output_ids[i], request.logprobs[i], top, new_text))
                self._text_sent += len(new_text)
            self._has_untold_end = count == self._num_sent and request.finish_reason in ("stop", "length")
            self._num_sent, self._ended = count, self._left or request.finish_reason is not None
            return self._woken()

    def fail(self, error: BaseException) -> Woken | None:
        """Ends the stream with an error; returns the future that its reader awaits, or None."""
        with self._ready:
            self._ended, self._error = True, error
            return self._woken()

    def _woken(self) -> Woken | None:
        self._ready.notify_all()
        if self._for_end and not self._ended:
            return None
        woken, self._waiting = self._waiting, None
        return woken


async def batches(
    streams: Iterable[TokenStream], pause: Callable[[], float] = lambda: 0.0
) -> AsyncIterator[list[tuple[int, list[Token], str | None]]]:
    """Reads many streams at once until all have ended: yields lists of (number of the stream, its new Tokens, its
    finish_reason), finish_reason being None but with the last Tokens. There are none where the tokens with which a
    request began end its answer.

    pause: called each time tokens came; for as many seconds as it returns, only the end of a stream wakes the reader,
    so that the tokens of this time come in one list.
    """
    left, loop = dict(enumerate(streams)), asyncio.get_running_loop()
    while left:
        woken = loop.create_future()
        taken = [(number, stream, stream.take(woken)) for number, stream in left.items()]
        left = {number: stream for number, stream, tokens in taken if tokens is not None}
        batch = [
            (number, tokens, stream.request.finish_reason if stream.is_read else None)
            for number, stream, tokens in taken
            if tokens or (tokens is not None and stream.is_read)
        ]
        if batch:
            until = loop.time() + pause()
            yield batch
            await _pause(list(left.values()), until, loop)
        elif left:
            await woken


async def _pause(streams: Sequence[TokenStream], until: float, loop: asyncio.AbstractEventLoop) -> None:
    """Waits until a time of the loop's clock, or for the end of a stream."""
    woken = loop.create_future()
    if until > loop.time() and not any([stream.wait_for_end(woken) for stream in streams]):
        timer = None if until == float("inf") else loop.call_at(until, _set, [woken])
        await woken
        if timer is not None:
            timer.cancel()


def _wake(futures: Iterable[Woken | None]) -> None:
    """Sets futures of any event loops, with one call for each loop: a call costs the engine's thread a system call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Woken]] = {}
    for future in futures:
        if future is not None:
            by_loop.setdefault(future.get_loop(), []).append(future)
    for loop, waiting in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the readers' event loop is closed: no reader waits any more
            loop.call_soon_threadsafe(_set, waiting)


def _set(futures: Iterable[Woken]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class AsyncEngine:
    """Runs an Engine in a thread of its own; from then on nothing else may use the Engine.

    Any thread may call `submit`, `submit_all` and a stream's `cancel`. An error in a step ends the engine: every
    open stream, and every later `submit`, raises EngineStopped with that error as its cause. Also lowers the
    interpreter's switch interval.

        running = AsyncEngine(llm.engine)
        async for token in running.submit(llm.encode("def f("), SamplingParams(max_tokens=32)):
            print(token.text, end="")
        running.close()
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: deque[tuple[str, TokenStream]] = deque()
        self._open: dict[int, TokenStream] = {}
        self._changed, self._closing = threading.Condition(), False
        self._error: BaseException | None = None
        self._step_began: float | None = None
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._run, name="lockstep engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_ids: Iterable[SupportsIndex],
        params: SamplingParams,
        output_ids: Iterable[Any] = (),
        **options: Any,
    ) -> TokenStream:
        """Queues one request; returns its TokenStream. output_ids, options: see `Engine.make`. ValueError if it cannot
        run."""
        check_single(params)
        return self.submit_all([(prompt_ids, params)], [output_ids], **options)[0]

    def submit_all(
        self,
        prompts: Iterable[tuple[Iterable[SupportsIndex], SamplingParams]],
        output_ids: Sequence[Iterable[Any]] | None = None,
        **options: Any,
    ) -> list[TokenStream]:
        """Queues every sample of all (prompt ids, SamplingParams), in order, or none if one of them cannot run.

        output_ids: of each prompt, see `Engine.make`, as are the other options; None: every answer begins anew.
        """
        requests_of = [
            self.engine.make(prompt_ids, params, output_ids=given, **options)
            for (prompt_ids, params), given in zip(prompts, output_ids or itertools.repeat(()), strict=False)
        ]
        return self.submit_made([request for requests in requests_of for request in requests])

    def submit_made(self, requests: Iterable[Request]) -> list[TokenStream]:
        """Queues requests that the Engine has made; returns their TokenStreams, in order."""
        streams = [TokenStream(self, request) for request in requests]
        self.send("submit", *[stream for stream in streams if stream.request.finish_reason is None])
        for stream in streams:
            if stream.request.finish_reason is not None:
                stream.advance()
        return streams

    def send(self, action: str, *streams: TokenStream) -> None:
        """Has the engine's thread "submit" or "cancel" streams. EngineStopped if they cannot be submitted."""
        if not self.is_alive:  # asked before the lock: in a forked process the lock may be held for ever
            if action == "submit":
                raise EngineStopped(str(self._error or "the engine does not run in this process")) from self._error
            return
        with self._changed:
            if action == "submit" and (self._closing or self._error is not None):
                raise EngineStopped(str(self._error or "the engine is closed")) from self._error
            self._inbox.extend((action, stream) for stream in streams)
            self._changed.notify()

    @property
    def error(self) -> BaseException | None:
        """The error that ended the engine; None while it runs."""
        return self._error

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs in this process."""
        return self._thread.is_alive()

    @property
    def seconds_in_step(self) -> float:
        """Seconds that the running step has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """Ends the thread after its running step; open streams raise EngineStopped. Then closes the Engine."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.engine.close()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        error = None
        try:
            while self._receive():
                if self.engine.has_work:
                    self._step()
        except BaseException as caught:
            error = caught
        self._stop(error or EngineStopped("the engine is closed"))

    def _receive(self) -> bool:
        """Submits and cancels the streams that were sent; waits while there is no work. False when the engine is to
        end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._closing or self.engine.has_work)
            if self._closing:
                return False
            received = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for action, stream in received:
            if action == "submit":
                self._open[stream.request.id] = stream
                self.engine.scheduler.add(stream.request)
            elif stream.request.id in self._open:
                self.engine.cancel(stream.request)
                _wake([self._open.pop(stream.request.id).advance()])
        return True

    def _step(self) -> None:
        self._step_began = time.monotonic()
        changed = self.engine.step()
        self._step_began = None
        _wake([self._open[request.id].advance() for request in changed])
        for request in changed:
            if request.finish_reason is not None:
                del self._open[request.id]

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            left = [stream for action, stream in self._inbox if action == "submit"]
            self._inbox.clear()
        _wake([stream.fail(error) for stream in [*self._open.values(), *left]])
        self._open.clear()
