"""One request and its answer, as HTTP sees them: bounds on the body, how it ends, and its line in the log."""

import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.types import Message, Receive, Scope, Send

from lockstep.serve.errors import ApiError
from lockstep.serve.fields.seed import SEED_HEADER
from lockstep.serve.request_log import CLIENT_LEFT, RequestLine
from lockstep.serve.service import Service

if TYPE_CHECKING:
    from lockstep.serve.generation import Generation

UPLOAD_PATH = "/v1/files"  # its body goes to the disk, so it may be larger than others
FORM_BYTES = 1 << 16  # of a form, besides its file
CLIENT_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")  # an X-Request-Id of a client that is taken over


class Exchange:
    """One request and its answer.

    id: names it in the log, in the header X-Request-Id of the answer, and at the end of the answer's own id; the
    client's X-Request-Id where it sent one of up to 64 letters, digits and . _ : -, else random. began: the time of its
    arrival (`time.monotonic`). started: whether the answer has begun. generation: what it generates, if it does. error:
    the error that ended it, also in a stream that had begun.
    """

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self._service, self._scope, self._receive, self._send = service, scope, receive, send
        self._headers = dict(scope["headers"])
        asked = self._headers.get(b"x-request-id", b"")
        self.id = asked.decode("ascii") if CLIENT_ID.fullmatch(asked) else secrets.token_hex(12)
        self.began, self._status, self._num_bytes = time.monotonic(), 0, 0
        self.generation: Generation | None = None
        self.error: ApiError | None = None
        self._has_client_left = False
        self._is_upload = scope["path"] == UPLOAD_PATH and scope["method"] == "POST"
        limits = service.limits
        self._max_bytes = limits.max_file_bytes + FORM_BYTES if self._is_upload else limits.max_body_bytes

    @property
    def started(self) -> bool:
        """Whether the answer has begun."""
        return self._status > 0

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.began

    # ------------------------------------------------------------ the body

    def check_length(self) -> None:
        """ApiError 413 for a Content-Length that is too large."""
        declared = self._headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 20 or int(declared) > self._max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next part of the body, or a disconnect. ApiError 413 if the body, 429 if all bodies, become too large."""
        message = await self._receive()
        size = len(message.get("body", b""))
        if size:
            self._take(size)
        return message

    def _take(self, size: int) -> None:
        limits = self._service.limits
        if self._num_bytes + size > self._max_bytes:
            raise self._too_large()
        self._num_bytes += size
        if self._is_upload:
            return
        self._service.num_bytes += size
        if self._service.num_bytes > limits.max_pending_bytes and self._service.num_bytes > self._num_bytes:
            raise self._service.too_busy("bodies_full", "the bodies of the requests in work take too much memory")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_bytes} bytes", code="body_too_large")

    # ------------------------------------------------------------ the answer

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._service.metrics.answered[self._status] += 1
            message = {**message, "headers": [*message.get("headers", ()), *self._own_headers()]}
        await self._send(message)

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        """The request's id and, from its admission on, the seed with which it is answered the same again."""
        seed = self.generation and self.generation.seed
        seeds = [] if seed is None else [(SEED_HEADER.lower().encode(), b"%d" % seed)]
        return [(b"x-request-id", self.id.encode("ascii")), *seeds]

    def failed(self, error: BaseException) -> ApiError:
        """Notes that an exception has ended the answer; returns it as the ApiError that the client may see."""
        self.error = self._service.explain(error)
        return self.error

    def left(self) -> None:
        """Notes that the client has left before the end of its answer."""
        self._has_client_left = True
        self._service.metrics.cancelled += 1

    def close(self) -> None:
        """The answer has ended: it is logged, and the memory of the body is free."""
        self._service.num_bytes -= 0 if self._is_upload else self._num_bytes
        self._service.request_log.ended(self._scope["path"], self._status, self.error, self._line)

    def _line(self) -> RequestLine:
        scope, client = self._scope, self._scope["client"]
        return RequestLine(
            method=scope["method"],
            path=scope["raw_path"].decode("ascii", "backslashreplace"),
            status=self._status or CLIENT_LEFT,
            error="client_left" if self._has_client_left else self.error and self.error.code,
            seconds=self.seconds,
            work=self.generation and self.generation.work(),
            id=self.id,
            client=client[0] if client else "",
        )
