"""An Engine in a thread of its own: any thread or event loop submits requests and reads their tokens as they come."""

import gc
import itertools
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex

from lockstep.engine.engine import Engine
from lockstep.engine.making import RequestMaker
from lockstep.engine.request import Request, SamplingParams, check_single
from lockstep.engine.token_stream import EngineStopped, TokenStream, wake

SWITCH_SECONDS = 5e-5  # until a busy Python thread hands over; the default of 5 ms would delay every step


def keep_loaded() -> None:
    """Leaves all objects that there are out of garbage collection, for ever: for processes that keep their model until
    they end. Python now and then looks through all of its objects for cycles; a loaded model with its compiler and
    tokenizer is 200000 of them, for which steps and readers would wait 0.1 s each time."""
    gc.collect()
    gc.freeze()


class ReplicaReport(NamedTuple):
    """One of several engines. is_ready: whether it runs requests; num_streams: how many; load: tokens of prompts that
    it has yet to compute, and some for each request; counts: see `Engine.counts`."""

    number: int
    is_ready: bool
    num_streams: int
    load: int
    counts: dict[str, int]


class StreamEngine(ABC):
    """Runs requests beside its callers, each of which reads a TokenStream. Any thread may call all of this.

    maker: makes the requests and checks whether they can run.
    """

    def __init__(self, maker: RequestMaker) -> None:
        self.maker = maker

    def submit(
        self,
        prompt_ids: Iterable[SupportsIndex],
        params: SamplingParams,
        output_ids: Iterable[Any] = (),
        **options: Any,
    ) -> TokenStream:
        """Queues one request; returns its TokenStream. output_ids, options: see `RequestMaker.make`. ValueError if it
        cannot run."""
        check_single(params)
        return self.submit_all([(prompt_ids, params)], [output_ids], **options)[0]

    def submit_all(
        self,
        prompts: Iterable[tuple[Iterable[SupportsIndex], SamplingParams]],
        output_ids: Sequence[Iterable[Any]] | None = None,
        **options: Any,
    ) -> list[TokenStream]:
        """Queues every sample of all (prompt ids, SamplingParams), in order, or none if one of them cannot run.

        output_ids: of each prompt, see `RequestMaker.make`, as are the other options; None: every answer begins anew.
        """
        requests_of = [
            self.maker.make(prompt_ids, params, output_ids=given, **options)
            for (prompt_ids, params), given in zip(prompts, output_ids or itertools.repeat(()), strict=False)
        ]
        return self.submit_made([request for requests in requests_of for request in requests])

    def submit_made(self, requests: Iterable[Request]) -> list[TokenStream]:
        """Queues requests that `maker` has made; returns their TokenStreams, in order."""
        streams = [TokenStream(self, request) for request in requests]
        self.send("submit", *[stream for stream in streams if stream.request.finish_reason is None])
        for stream in streams:
            if stream.request.finish_reason is not None:
                stream.advance()
        return streams

    @abstractmethod
    def send(self, action: str, *streams: TokenStream) -> None:
        """Has streams "submit"ted or "cancel"led. EngineStopped if they cannot be submitted."""

    @property
    @abstractmethod
    def error(self) -> BaseException | None:
        """The error that ended the engine; None while it runs."""

    @property
    @abstractmethod
    def seconds_in_step(self) -> float:
        """Seconds that the running step has taken so far; 0 between steps."""

    @abstractmethod
    def close(self) -> None:
        """Ends the engine after its running step; open streams raise EngineStopped."""

    @property
    def is_ready(self) -> bool:
        """Whether there is an engine that runs requests; else they wait for one."""
        return True

    def replica_reports(self) -> list[ReplicaReport]:
        """What is to be known of each engine, where there are several; else nothing."""
        return []

    def event_counts(self) -> dict[str, int]:
        """What happened to several engines so far: {name: number}; nothing where there is one."""
        return {}

    def restart(self) -> None:
        """Replaces several engines by fresh ones, one after the other, while their streams go on. ValueError where
        there is one only."""
        raise ValueError("there is one engine, in the server's own process: only replicas can be replaced")


class EngineThread:
    """A thread that runs an Engine, which from then on nothing else may use. Lowers the interpreter's switch interval.

    advanced: called in the thread with the requests that a step, or a "cancel", has changed. stopped: called in it,
    last, with the error that ended it, which an error in a step or `close` is, and the requests that had not ended.
    """

    def __init__(
        self,
        engine: Engine,
        advanced: Callable[[list[Request]], None],
        stopped: Callable[[BaseException, list[Request]], None],
    ) -> None:
        self.engine, self._advanced, self._stopped = engine, advanced, stopped
        self._inbox: deque[tuple[str, Request]] = deque()
        self._open: dict[int, Request] = {}
        self._changed, self.is_closing = threading.Condition(), False
        self.error: BaseException | None = None
        self._step_began: float | None = None
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._run, name="lockstep engine", daemon=True)
        self._thread.start()

    def send(self, action: str, *requests: Request) -> None:
        """Has the thread "submit" or "cancel" requests. EngineStopped if they cannot be submitted."""
        if not self.is_alive:  # asked before the lock: in a forked process the lock may be held for ever
            if action == "submit":
                raise EngineStopped(str(self.error or "the engine does not run in this process")) from self.error
            return
        with self._changed:
            if action == "submit" and (self.is_closing or self.error is not None):
                raise EngineStopped(str(self.error or "the engine is closed")) from self.error
            self._inbox.extend((action, request) for request in requests)
            self._changed.notify()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs in this process."""
        return self._thread.is_alive()

    @property
    def seconds_in_step(self) -> float:
        """Seconds that the running step has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """Ends the thread after its running step, then closes the Engine."""
        with self._changed:
            self.is_closing = True
            self._changed.notify()
        self._thread.join()
        self.engine.close()

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
        """Submits and cancels the requests that were sent; waits while there is no work. False when the engine is to
        end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self.is_closing or self.engine.has_work)
            if self.is_closing:
                return False
            received = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for action, request in received:
            if action == "submit":
                self._open[request.id] = request
                self.engine.scheduler.add(request)
            elif self._open.pop(request.id, None) is not None:
                self.engine.cancel(request)
                self._advanced([request])
        return True

    def _step(self) -> None:
        self._step_began = time.monotonic()
        changed = self.engine.step()
        self._step_began = None
        self._advanced(changed)
        for request in changed:
            if request.finish_reason is not None:
                del self._open[request.id]

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self.error = error
            left = [request for action, request in self._inbox if action == "submit"]
            self._inbox.clear()
        self._stopped(error, [*self._open.values(), *left])
        self._open.clear()


class AsyncEngine(StreamEngine):
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
        super().__init__(engine)
        self.engine, self._streams = engine, dict[int, TokenStream]()
        self._thread = EngineThread(engine, self._advance, self._stop)

    def send(self, action: str, *streams: TokenStream) -> None:
        """Has the engine's thread "submit" or "cancel" streams. EngineStopped if they cannot be submitted."""
        if action == "submit":
            self._streams.update((stream.request.id, stream) for stream in streams)
        try:
            self._thread.send(action, *[stream.request for stream in streams])
        except EngineStopped:
            for stream in streams:
                self._streams.pop(stream.request.id, None)
            raise

    @property
    def error(self) -> BaseException | None:
        """The error that ended the engine; None while it runs."""
        return self._thread.error

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return self._thread.is_closing

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs in this process."""
        return self._thread.is_alive

    @property
    def seconds_in_step(self) -> float:
        """Seconds that the running step has taken so far; 0 between steps."""
        return self._thread.seconds_in_step

    def close(self) -> None:
        """Ends the thread after its running step; open streams raise EngineStopped. Then closes the Engine."""
        self._thread.close()

    # ------------------------------------------------------------ the engine's thread

    def _advance(self, requests: list[Request]) -> None:
        wake([self._streams[request.id].advance() for request in requests])
        for request in requests:
            if request.finish_reason is not None:
                del self._streams[request.id]

    def _stop(self, error: BaseException, requests: list[Request]) -> None:
        wake([self._streams.pop(request.id).fail(error) for request in requests])
