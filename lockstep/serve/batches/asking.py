"""Asks the server's routes for the answer to a line of a batch, within this process."""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message

from lockstep.batch.lines import Line, response_line
from lockstep.batch.work import Answer
from lockstep.serve.batches.settled import settled
from lockstep.serve.generation import PRIORITY_KEY
from lockstep.serve.service import Service

PRIORITY = 1  # of the engine's requests: those that are sent to the server have 0, and go first
SMALL_BYTES = 1 << 15  # an answer up to here is settled on the event loop
BUSY = (429, 503)
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0
CLIENT = ("batch", 0)  # in place of an address, in the log


class NoAnswers(ValueError):
    """The engine has stopped: no line will be answered any more."""


class Asking:
    """Asks for answers as one tenant. app: routes and error objects, see `app.inner_app`. may_ask: whether a line that
    had to make room may be asked again."""

    def __init__(
        self, app: ASGIApp, service: Service, tenant: str = "", may_ask: Callable[[], bool] = lambda: True
    ) -> None:
        self._app, self._service, self._tenant, self._may_ask = app, service, tenant, may_ask
        self._attempts: list[asyncio.Task[tuple[int, bytes]]] = []

    async def __call__(self, line: Line) -> Answer:
        """The line of the output for a line that can be asked. While the server is busy it is asked again. NoAnswers
        where the engine has stopped."""
        pause, answer = FIRST_PAUSE, await self._attempt(line)
        while answer is None or answer[0] in BUSY:
            if self._service.engine_trouble is not None:
                raise NoAnswers(self._service.engine_trouble)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            answer = await self._attempt(line) if self._may_ask() else None
        status, body = answer
        if status == 200:
            body = await _settled(body, line.key)
        return response_line(line.key, line.custom_id, status, body), status == 200

    def make_room(self) -> None:
        """Takes back the line that was asked last; it is asked again when it may be."""
        if self._attempts:
            self._attempts[-1].cancel()

    async def _attempt(self, line: Line) -> tuple[int, bytes] | None:
        """The status and body of an answer; None where the line had to make room."""
        attempt = asyncio.create_task(self._answer(line))
        self._attempts.append(attempt)
        try:
            await asyncio.wait([attempt])
            return None if attempt.cancelled() else attempt.result()
        finally:
            self._attempts.remove(attempt)
            attempt.cancel()

    async def _answer(self, line: Line) -> tuple[int, bytes]:
        parts = [dict(type="http.request", body=line.body, more_body=False)]
        status, pieces = [], list[bytes]()

        async def receive() -> Message:
            if not parts:
                await asyncio.Event().wait()  # this client never leaves
            return parts.pop()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
            else:
                pieces.append(message.get("body", b""))

        await self._app(self._scope(line), receive, send)
        return status[0], b"".join(pieces)

    def _scope(self, line: Line) -> dict[str, Any]:
        headers = {
            b"content-type": b"application/json",
            b"content-length": b"%d" % len(line.body),
            b"x-request-id": line.key.hex().encode("ascii"),
        }
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": line.url,
            "raw_path": line.url.encode("ascii"),
            "query_string": b"",
            "root_path": "",
            "headers": list(headers.items()),
            "client": CLIENT,
            "server": None,
            "lockstep.tenant": self._tenant,
            PRIORITY_KEY: PRIORITY,
        }


async def _settled(body: bytes, key: bytes) -> bytes:
    """`settled`, beside the event loop where that takes long."""
    return settled(body, key) if len(body) <= SMALL_BYTES else await asyncio.to_thread(settled, body, key)
