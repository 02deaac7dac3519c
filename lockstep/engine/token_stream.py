"""The tokens of a request as they come: a TokenStream for one reader, in any thread or event loop."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from lockstep.engine.request import Request

Woken = asyncio.Future[None]  # a reader awaits it; the engine's thread sets it


class Sender(Protocol):
    """What runs the requests of TokenStreams."""

    def send(self, action: str, *streams: "TokenStream") -> None:
        """Has streams "submit"ted or "cancel"led."""
        ...


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

    def __init__(self, engine: Sender, request: Request) -> None:
        self.request, self._engine = request, engine
        self._tokens: deque[Token] = deque()
        self._lock = threading.Lock()
        self._ready, self._blocks = threading.Condition(self._lock), False  # blocks: whether a thread reads it
        self._for_end, self._ended, self._left = False, False, False
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
    def error(self) -> BaseException | None:
        """What ended the stream before its request came to an end; None otherwise."""
        return self._error

    def cancel(self) -> None:
        """Ends the request before the engine's next step. Any thread may call this, at any time."""
        self._engine.send("cancel", self)

    def leave(self) -> None:
        """Cancels the request and ends the stream for its reader at once, even if the engine's step never returns."""
        self.cancel()
        with self._lock:
            self._left = self._ended = True
            woken = self._woken()
        wake([woken])

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
        with self._lock:
            self._blocks = True
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
            with self._lock:
                if self._tokens or self._ended:
                    return self._next(StopAsyncIteration)
                self._waiting, self._for_end = woken, False
            await woken

    def take(self) -> tuple[list[Token], str | None, bool]:
        """(all tokens that have come, the finish_reason, whether the stream is at its end). The finish_reason comes
        with the last tokens, or by itself where no token could bear it; else it is None."""
        with self._lock:
            taken = list(self._tokens)
            self._tokens.clear()
            if not self._ended:
                return taken, None, False
            if not taken:
                self._check()
            is_at_end = self._error is None
            has_reason = is_at_end and (taken or self._has_untold_end)
            return taken, self.request.finish_reason if has_reason else None, is_at_end

    def wait(self, woken: Woken, *, for_end: bool = False) -> bool:
        """Has the future `woken` set when tokens come, or the stream ends; for_end: only when it ends. Returns True,
        and does not set it, if that has happened."""
        with self._lock:
            self._waiting, self._for_end = woken, for_end
            return self._ended or (bool(self._tokens) and not for_end)

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
        with self._lock:
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
        with self._lock:
            self._ended, self._error = True, error
            return self._woken()

    def _woken(self) -> Woken | None:
        if self._blocks:
            self._ready.notify_all()
        if self._for_end and not self._ended:
            return None
        woken, self._waiting = self._waiting, None
        return woken


Batch = list[tuple[int, list[Token], str | None]]  # (number of a stream, its new Tokens, its finish_reason), ...
Pause = Callable[[Woken, Batch], bool]  # has a future set some time later; False where there is nothing to wait for


def no_pause(woken: Woken, batch: Batch) -> bool:
    """Tokens are read as they come."""
    return False


def until_the_end(woken: Woken, batch: Batch) -> bool:
    """Tokens are read when a stream ends."""
    return True


class Frames:
    """A Pause that ends at the same moments for all who wait, so that an event loop wakes up once for many streams.

    seconds: the length of a frame, which begins with the first that waits, given how many tokens came to one of its
    streams; 0: nobody waits. All that wait are of one event loop.
    """

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds, self._waiting = seconds, list[Woken]()

    def __call__(self, woken: Woken, batch: Batch) -> bool:
        if not self._waiting:
            seconds = self._seconds(max([len(tokens) for _, tokens, _ in batch]))
            if seconds <= 0:
                return False
            woken.get_loop().call_later(seconds, self._end)
        self._waiting.append(woken)
        return True

    def _end(self) -> None:
        waiting, self._waiting = self._waiting, []
        _set(waiting)


async def batches(streams: Iterable[TokenStream], pause: Pause = no_pause) -> AsyncIterator[Batch]:
    """Reads many streams at once until all have ended: yields lists of (number of the stream, its new Tokens, its
    finish_reason), finish_reason being None but with the last Tokens. There are none where the tokens with which a
    request began end its answer.

    pause: called each time tokens came, with them; until the future is set, only the end of a stream wakes the reader,
    so that the tokens of this time come in one list.
    """
    left, loop = dict(enumerate(streams)), asyncio.get_running_loop()
    while left:
        found: Batch = []
        for number, stream in [*left.items()]:
            tokens, reason, is_at_end = stream.take()
            if tokens or reason is not None:
                found.append((number, tokens, reason))
            if is_at_end:
                del left[number]
        woken = loop.create_future()
        pauses = pause(woken, found) if found else True
        if found:
            yield found
        if pauses and left and not any([stream.wait(woken, for_end=bool(found)) for stream in left.values()]):
            await woken


def wake(futures: Iterable[Woken | None]) -> None:
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
