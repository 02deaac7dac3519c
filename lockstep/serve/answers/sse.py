"""Answers sent in pieces: server-sent events, and large JSON between whose pieces other requests have their turn."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lockstep.serve.answer_size import num_values_held
from lockstep.serve.answers.json_response import json_pieces, json_response, to_json
from lockstep.serve.errors import shape_for
from lockstep.serve.generation import Generation

LARGE = 1 << 14  # values; the JSON of fewer takes at most a few milliseconds and a megabyte
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
LOOK_SECONDS = 0.05
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def data_event(value):
    """A server-sent event without a name, as in OpenAI's streams."""
    return b"data: %b\n\n" % to_json(value)


def named_event(name, value):
    """A server-sent event with a name, as in streams of /v1/messages and /v1/responses."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(value))


class EventStream:
    """An ASGI response that sends the bytes of an async generator, each one or more complete events.

    Comments keep the connection open between events. An exception of the generator becomes an error event; exceptions
    that are no ApiError are also logged. end: bytes that follow the last event, also after an error.
    """

    def __init__(self, generation: Generation, events, end=DONE) -> None:
        self._generation, self._events, self._end, self._sent = generation, events, end, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        comments = asyncio.create_task(self._keep_alive(send, scope.get("lockstep.has_ended") or asyncio.Event()))
        try:
            async with contextlib.aclosing(self._events):
                await self._send_all(send, scope["path"])
        finally:
            comments.cancel()

    async def _send_all(self, send: Send, path) -> None:
        try:
            async for piece in self._events:
                if piece:
                    self._sent = time.monotonic()
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            last = self._end
        except ClientDisconnect:
            raise
        except Exception as error:
            problem = shape_for(path)(self._generation.explain(error))
            last = (named_event("error", problem) if "type" in problem else data_event(problem)) + self._end
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _keep_alive(self, send: Send, has_ended) -> None:
        """Sends a comment whenever nothing was sent for a while. has_ended: set when the client has closed its side of
        the connection; comments are then sent soon, to find out whether the client still reads."""
        longest, pause = self._generation.service.limits.keep_alive_seconds, LOOK_SECONDS
        while True:
            if has_ended.is_set():
                silent = pause
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
            else:
                silent = longest
                # wait_for of Python 3.11 would lose a cancellation that comes together with the awaited event
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._sent + longest - time.monotonic()):
                        await has_ended.wait()
            if time.monotonic() - self._sent >= silent:
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})


async def json_answer(
    generation: Generation, make: Callable[[], object], is_quick: bool = False, size: int | None = None
) -> "Response | Pieces":
    """The response with the JSON of the value that `make` returns, in which large arrays should be Parts.

    is_quick: whether making a small answer takes less time than a hop to a worker thread; size: the number of values in
    the answer, if it is not that of the generation's requests.
    """
    if (num_values_held(generation.requests) if size is None else size) >= LARGE:
        return Pieces(generation, json_pieces(await generation.offload(make)))
    return json_response(make() if is_quick else await generation.offload(lambda: to_json(make())))


class Pieces:
    """An ASGI response of JSON in pieces, without a Content-Length."""

    def __init__(self, generation: Generation, pieces: Iterator[bytes]) -> None:
        self._generation, self._pieces = generation, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        for piece in self._pieces:
            self._generation.raise_if_ended()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
