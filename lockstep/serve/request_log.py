"""A line in the log for each request that has ended: what it was, how it ended, and what it took."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from lockstep.serve.errors import ApiError
from lockstep.serve.metrics import Metrics

SUMMARY_SECONDS = 10.0
MAX_PATH_CHARACTERS = 200
CLIENT_LEFT = 499  # as nginx has it: the client left before the answer began
WATCHING = {"/health", "/ready", "/metrics"}  # paths that programs ask again and again
FAULTS = {500, 504}  # HTTP statuses of errors that are the server's own, and not of its load
log = logging.getLogger("lockstep.requests")


class Work(NamedTuple):
    """What the engine did for a request. Tokens are those of all its sequences, but a prompt counts once; seconds are
    None as long as nothing has come to that.

    num_cached: of num_prompt, those that the prefix cache had. queue_seconds: until the first sequence was admitted.
    first_seconds: from the request's arrival to the first token. prefill, decode: tokens that were computed, and the
    seconds of that: of the prompt, where there is one only, and after the first tokens of the answer.
    """

    num_prompt: int
    num_cached: int
    num_generated: int
    queue_seconds: float
    first_seconds: float | None
    prefill: tuple[int, float] | None
    decode: tuple[int, float] | None


class RequestLine(NamedTuple):
    """A request that has ended. status: of HTTP; error: the code of the error that ended it, in a stream too. seconds:
    from its arrival to the end of its answer; None where it never became a request."""

    method: str
    path: str
    status: int
    error: str | None
    client: str
    id: str | None = None
    seconds: float | None = None
    work: Work | None = None

    def __str__(self) -> str:
        """Words of the form name=value, which are left out where there is nothing to say."""
        return " ".join([self.method, self.path[:MAX_PATH_CHARACTERS], str(self.status), *self._words()])

    def _words(self) -> Iterator[str]:
        if self.work is not None:
            yield f"prompt={self.work.num_prompt} cached={self.work.num_cached} generated={self.work.num_generated}"
            yield f"queue={milliseconds(self.work.queue_seconds)}"
            if self.work.first_seconds is not None:
                yield f"ttft={milliseconds(self.work.first_seconds)}"
        if self.seconds is not None:
            yield f"total={milliseconds(self.seconds)}"
        if self.work is not None:
            yield from speeds(prefill=self.work.prefill, decode=self.work.decode)
        for name, value in (("error", self.error), ("id", self.id), ("client", self.client)):
            if value:
                yield f"{name}={value}"


def milliseconds(seconds: float) -> str:
    """ "3.2ms", "1420ms"."""
    return f"{1000 * seconds:.{1 if seconds < 0.01 else 0}f}ms"


def speeds(**measured: tuple[int, float] | None) -> Iterator[str]:
    """ "decode=91.3tok/s" of {"decode": (tokens, seconds)}, where there are tokens."""
    for name, found in measured.items():
        if found is not None and found[0] and found[1] > 0:
            speed = found[0] / found[1]
            yield f"{name}={speed:.{1 if speed < 100 else 0}f}tok/s"


class RequestLog:
    """Logs requests as they end, at level info; at level debug where they only ask how the server is, or for its page;
    as a warning where a fault of the server ended them. Only the event loop may use it.

    is_quiet: lines of level info become level debug, and while there is work `tick` logs a summary every
    SUMMARY_SECONDS. counts: of the engine.
    """

    def __init__(self, metrics: Metrics, counts: Callable[[], Mapping[str, int]], is_quiet: bool = False) -> None:
        self._metrics, self._counts, self._is_quiet = metrics, counts, is_quiet
        self._num_requests = self._num_failed = 0
        self._last, self._last_time = self._totals(), time.monotonic()

    def ended(self, path: str, status: int, error: ApiError | None, line: Callable[[], RequestLine]) -> None:
        """A request has ended. path: without repeated slashes; status: 0 where there was no answer; line: makes its
        line, if it is logged."""
        is_watching = path in WATCHING or path == "/" or path.startswith("/page/")
        if not is_watching:
            self._num_requests += 1
            self._num_failed += error is not None or status >= 400
        level = logging.DEBUG if self._is_quiet or is_watching else logging.INFO
        if error is not None and (error.status in FAULTS or error.code == "engine"):
            level = logging.WARNING
        if log.isEnabledFor(level):
            log.log(level, "%s", line())

    def refused(self, line: RequestLine) -> None:
        """A connection was closed with an error before there was a request. Where it has no path, nobody asked for
        anything: browsers open connections in advance."""
        log.log(logging.INFO if line.path and not self._is_quiet else logging.DEBUG, "%s", line)

    def tick(self, num_open: int) -> None:
        """Logs a summary, if one is due and there was work. num_open: the number of requests that are being answered.
        Called several times a second."""
        now = time.monotonic()
        if not self._is_quiet or now - self._last_time < SUMMARY_SECONDS:
            return
        totals, seconds = self._totals(), now - self._last_time
        moved = [new - old for new, old in zip(totals, self._last, strict=True)]
        self._last, self._last_time = totals, now
        if any(moved) or num_open:
            log.info("%s", self._summary(moved, seconds))

    def _totals(self) -> tuple[int, int, int, int, int]:
        metrics = self._metrics
        tokens = metrics.prompt_tokens, metrics.cached_tokens, metrics.generated_tokens
        return self._num_requests, self._num_failed, *tokens

    def _summary(self, moved: list[int], seconds: float) -> str:
        num_requests, num_failed, prompt, cached, generated = moved
        counts = self._counts()
        words = [f"{seconds:.0f} s: requests={num_requests} failed={num_failed}"]
        words.append(f"prompt={prompt} cached={cached} generated={generated}")
        words += speeds(prefill=(prompt - cached, seconds), decode=(generated, seconds))
        return " ".join([*words, f"running={counts.get('running', 0)} waiting={counts.get('waiting', 0)}"])
