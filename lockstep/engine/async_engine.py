"""An engine in a thread of its own: any thread or event loop submits requests and reads their tokens as they come."""
import asyncio
import sys
import threading
from collections import deque
from dataclasses import dataclass

SWITCH_SECONDS = 5e-5  # a busy Python thread hands over after so long; the default of 5 ms would delay every step


class EngineStopped(RuntimeError):
    """The engine ended before the request did: it was closed, or a step failed (then that error is the cause)."""


@dataclass(frozen=True)
class Token:
    """One token of an answer: its place in it, id, log-probability, alternatives if they were asked for, and the text
    that became certain with it (tokens may share a character, and what may begin a stop string is held back)."""

    index: int
    id: int
    logprob: float
    top_logprobs: dict[int, float] | None
    text: str


class TokenStream:
    """The tokens of one request, for one reader: `for token in stream` or `async for token in stream`.

    After the last token `finish_reason` says why it ended, and `request` has all that is known. Raises EngineStopped if
    the engine ends first.
    """

    def __init__(self, engine, request):
        self.request, self._engine = request, engine
        self._tokens, self._ready, self._waiting = deque(), threading.Condition(), None
        self._ended, self._error, self._num_sent, self._text_sent = False, None, 0, 0

    @property
    def finish_reason(self):
        """"stop", "length", "error" or "cancelled"; None while it runs."""
        return self.request.finish_reason if self._ended else None

    def cancel(self):
        """Ends the request before the engine's next step. Any thread may call this, at any time."""
        self._engine._send("cancel", self)

    # ------------------------------------------------------------ the reader's side

    def __iter__(self):
        return self

    def __next__(self):
        with self._ready:
            self._ready.wait_for(lambda: self._tokens or self._ended)
            return self._next(StopIteration)

    def __aiter__(self):
        return self

    async def __anext__(self):
        while True:
            with self._ready:
                if self._tokens or self._ended:
                    return self._next(StopAsyncIteration)
                loop = asyncio.get_running_loop()
                woken = loop.create_future()
                self._waiting = loop, woken
            await woken

    def _next(self, end):
        if self._tokens:
            return self._tokens.popleft()
        if self._error is not None:
            raise EngineStopped(str(self._error)) from self._error
        raise end

    # ------------------------------------------------------------ the engine's side

    def _advance(self):
        """Hands over what the request has got since the last time."""
        request, count = self.request, len(self.request.output_ids)
        text = request.answer.text if request.answer is not None else ""
        with self._ready:
            for i in range(self._num_sent, count):
                top = request.top_logprobs[i] if request.top_logprobs else None
                new_text = text[self._text_sent:] if i == count - 1 else ""
                self._tokens.append(Token(i, request.output_ids[i], request.logprobs[i], top, new_text))
                self._text_sent += len(new_text)
            self._num_sent, self._ended = count, request.finish_reason is not None
            self._wake()

    def _fail(self, error):
        with self._ready:
            self._ended, self._error = True, error
            self._wake()

    def _wake(self):
        self._ready.notify_all()
        if self._waiting is not None:
            (loop, woken), self._waiting = self._waiting, None
            try:
                loop.call_soon_threadsafe(_set, woken)
            except RuntimeError:  # the reader's event loop is closed: nobody waits any more
                pass


def _set(future):
    if not future.done():
        future.set_result(None)


class AsyncEngine:
    """Runs an Engine in its own thread, which nobody else may use from then on.

    Any thread may call `submit`, `submit_samples` and a stream's `cancel`. An error in a step ends the engine: every
    open stream, and every later `submit`, raises EngineStopped with that error as its cause. Also lowers the
    interpreter's switch interval.
    """

    def __init__(self, engine):
        self.engine, self._inbox, self._open = engine, deque(), {}
        self._changed, self._closing, self._error = threading.Condition(), False, None
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._run, name="lockstep engine", daemon=True)
        self._thread.start()

    def submit(self, prompt_ids, params, **options):
        """Queues one request; returns its TokenStream. options: of Engine.make. ValueError for one that cannot run."""
        if params.n != 1:
            raise ValueError(f"n: expected 1 where one stream is returned, got {params.n}")
        return self.submit_samples(prompt_ids, params, **options)[0]

    def submit_samples(self, prompt_ids, params, **options):
        """Queues the `params.n` samples of a prompt; returns a TokenStream for each."""
        streams = [TokenStream(self, request) for request in self.engine.make(prompt_ids, params, **options)]
        self._send("submit", *streams)
        return streams

    def _send(self, what, *streams):
        with self._changed:
            if what == "submit" and (self._closing or self._error is not None):
                raise EngineStopped(str(self._error or "the engine is closed")) from self._error
            self._inbox.extend((what, stream) for stream in streams)
            self._changed.notify()

    def close(self):
        """Ends the thread after the step that it is in; open streams raise EngineStopped. Then closes the engine."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.engine.close()

    # ------------------------------------------------------------ the engine's thread

    def _run(self):
        error = None
        try:
            while self._receive():
                if self.engine.has_work:
                    self._step()
        except BaseException as caught:
            error = caught
        self._stop(error or EngineStopped("the engine is closed"))

    def _receive(self):
        """Acts on what was sent; waits where there is nothing to do. False when the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._closing or self.engine.has_work)
            if self._closing:
                return False
            received = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for what, stream in received:
            if what == "submit":
                self._open[stream.request.id] = stream
                self.engine.scheduler.add(stream.request)
            elif stream.request.id in self._open:
                self.engine.cancel(stream.request)
                self._open.pop(stream.request.id)._advance()
        return True

    def _step(self):
        for request in self.engine.step():
            self._open[request.id]._advance()
            if request.finish_reason is not None:
                del self._open[request.id]

    def _stop(self, error):
        with self._changed:
            self._error = error
            left = [stream for what, stream in self._inbox if what == "submit"]
            self._inbox.clear()
        for stream in [*self._open.values(), *left]:
            stream._fail(error)
        self._open.clear()
