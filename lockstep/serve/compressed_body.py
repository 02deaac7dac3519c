"""Compressed request bodies: gzip is unpacked piece by piece, every other coding is refused."""

import asyncio
import zlib
from collections.abc import AsyncIterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.serve.errors import ApiError, bad_request

PIECE_BYTES = 64 << 10  # the most that is unpacked at once
GZIP = 16 + zlib.MAX_WBITS


class GzipBodyMiddleware:
    """Hands on a gzip body unpacked. The next middleware counts the unpacked bytes, and stops reading at the limit."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        coding = content_coding(scope) if scope["type"] == "http" else ""
        await self._app(scope, UnpackedBody(receive, coding, self._max_bytes) if coding else receive, send)


def content_coding(scope: Scope) -> str:
    """All values of Content-Encoding in lower case, separated by commas; "" where the body is not encoded."""
    values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"content-encoding"]
    codings = [each.strip().lower() for value in values for each in value.split(",")]
    return ", ".join(each for each in codings if each not in ("", "identity"))


class UnpackedBody:
    """An ASGI `receive` that returns the unpacked parts of a body. max_bytes: the limit of the packed body.

    ApiError 415 for a coding that is not gzip, 413 for a packed body that is too large, 400 for one that is not gzip.
    """

    def __init__(self, receive: Receive, coding: str, max_bytes: int) -> None:
        self._receive, self._coding, self._max_bytes = receive, coding, max_bytes
        self._parts = self._unpacked()
        self._num_bytes, self._member = 0, zlib.decompressobj(GZIP)

    async def __call__(self) -> Message:
        """The next part, or the message that follows the body."""
        async for message in self._parts:
            await asyncio.sleep(0)  # other requests have their turn between two parts
            return message
        return await self._receive()

    async def _unpacked(self) -> AsyncIterator[Message]:
        if self._coding not in ("gzip", "x-gzip"):
            raise ApiError(
                415, f"Content-Encoding: expected gzip or none, got {self._coding[:80]}", code="unsupported_encoding"
            )
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                yield message
                return
            more = message.get("more_body", False)
            for piece in self._pieces(message.get("body", b"")):
                yield dict(type="http.request", body=piece, more_body=True)
        if not self._member.eof:
            raise bad_request("the body is not valid gzip: it ends too soon")
        yield dict(type="http.request", body=b"", more_body=False)

    def _pieces(self, packed: bytes):
        """Yields the unpacked bytes of a part; a gzip file may consist of several members."""
        self._num_bytes += len(packed)
        if self._num_bytes > self._max_bytes:
            raise ApiError(413, f"the body is larger than {self._max_bytes} bytes", code="body_too_large")
        while packed:
            if self._member.eof:
                self._member = zlib.decompressobj(GZIP)
            try:
                piece = self._member.decompress(packed, PIECE_BYTES)
            except zlib.error as error:
                raise bad_request(f"the body is not valid gzip: {error}") from None
            packed = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            yield piece
