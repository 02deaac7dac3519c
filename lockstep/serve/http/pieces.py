"""Large answers are written in pieces: each takes a moment and little memory, and others are answered between them."""

import asyncio
from collections.abc import Callable, Iterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lockstep.serve.http.encode import json_pieces, json_response, to_json
from lockstep.serve.http.job import Job
from lockstep.serve.http.values import num_held

LARGE = 1 << 14  # values; fewer take a few milliseconds and a megabyte
HEADERS = [(b"content-type", b"application/json")]


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
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        for piece in self._pieces:
            self._job.go_on()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
