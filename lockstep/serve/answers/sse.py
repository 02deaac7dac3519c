"""Answers that come in pieces: server-sent events, and large ones, which others are answered between."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lockstep.serve.answer_size import num_held
from lockstep.serve.answers.json_response import json_pieces, json_response, to_json
from lockstep.serve.errors import shape_for
from lockstep.serve.generation import Job

LARGE = 1 << 14  # values; fewer take a few milliseconds and a megabyte
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
LOOK_SECONDS = 0.05
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def data(value):
    """An event in OpenAI's form."""
    return b"data: %b\n\n" % to_json(value)


def named(name, value):
    """An event with a name of its own, in Anthropic's form."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(value))


class EventStream:
    """An ASGI response that sends what an async generator yields: bytes, each one or more whole events.

    Comments keep it open while nothing comes. An ApiError that the generator raises becomes an event; any other is
    logged and becomes a general one. end: sent after the last event, also after an error.
    """

    def __init__(self, job: Job, events, end=DONE) -> None:
        self._job, self._events, self._end, self._silent = job, events, end, True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        comments = asyncio.create_task(self._keep_alive(send, scope["lockstep.has_ended"]))
        try:
            async with contextlib.aclosing(self._events):
                await self._send_all(send, scope["path"])
        finally:
            comments.cancel()

    async def _send_all(self, send: Send, path) -> None:
        try:
            async for piece in self._events:
                if piece:
                    self._silent = False
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            last = self._end
        except ClientDisconnect:
            raise
        except Exception as error:
            shaped = shape_for(path)(self._job.explain(error))
            last = (named("error", shaped) if "type" in shaped else data(shaped)) + self._end
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _keep_alive(self, send: Send, has_ended) -> None:
        """has_ended: set when the client sends no more; comments then come soon, to show whether it is still there."""
        longest, pause = self._job.service.limits.keep_alive_seconds, LOOK_SECONDS
        while True:
            if has_ended.is_set():
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
            else:
                # not wait_for: in Python 3.11 it goes on where it is cancelled just as what it waits for comes
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(longest):
                        await has_ended.wait()
            if self._silent:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            self._silent = True


async def json_answer(
    job: Job, make: Callable[[], object], is_quick: bool = False, size: int | None = None
) -> "Response | Pieces":
    """The response with the JSON of what `make` returns, in which large arrays should be Parts.

    is_quick: it takes no longer than a hop to a thread, unless the answer is large; size: its values, if they are not
    those of the job's requests.
    """
    if (num_held(job.requests) if size is None else size) >= LARGE:
        return Pieces(job, json_pieces(await job.offload(make)))
    return json_response(make() if is_quick else await job.offload(lambda: to_json(make())))


class Pieces:
    """An ASGI response of JSON whose length nobody knows before its end."""

    def __init__(self, job: Job, pieces: Iterator[bytes]) -> None:
        self._job, self._pieces = job, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        for piece in self._pieces:
            self._job.go_on()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
