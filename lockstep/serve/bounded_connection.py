"""Connections with bounds that uvicorn lacks: the size of headers, the number of connections, the time to send."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lockstep.serve import request_target
from lockstep.serve.answers.json_response import to_json
from lockstep.serve.connections import Connections
from lockstep.serve.errors import ApiError, openai_shape
from lockstep.serve.limits import Limits
from lockstep.serve.request_log import RequestLine, RequestLog

ALIVE = (b"/health", b"/ready")  # the paths that are served where there are too many connections
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PROBE_SECONDS, LONGEST_PROBE = 0.05, 1.0
LAST_LOOK_SECONDS = 0.05
HEADER_COST = 32  # bytes that are added to the size of each header


def bounded_protocol(limits: Limits, request_log: RequestLog) -> type[HttpToolsProtocol]:
    """A subclass of uvicorn's protocol with these limits, which logs refused connections."""
    parts = dict(limits=limits, open_connections=Connections(limits), request_log=request_log)
    return type("Bounded", (BoundedProtocol,), parts)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with httptools' parser, with bounds.

    limits, open_connections (those of the whole server) and request_log are attributes of the subclass that
    `bounded_protocol` makes.
    """

    limits: Limits
    open_connections: Connections
    request_log: RequestLog

    def connection_made(self, transport) -> None:
        """Takes a connection; where there are too many, it may only ask for ALIVE paths."""
        super().connection_made(transport)
        # bytes of the headers so far, and bytes received since the parser last completed headers or a part of a body
        self._num_head_bytes, self._num_pending = 0, 0
        self._timer, self._stalled, self._is_in_head, self._has_progress, self._refused = None, None, True, False, False
        self._has_ended, self._probe = asyncio.Event(), None
        self._is_spare = not self.open_connections.enter(self, self.client[0] if self.client else "")
        if not self._refused:
            self._set_timer()

    def connection_lost(self, error) -> None:
        """The connection is gone."""
        self.open_connections.leave(self)
        self._clear_timer()
        if self._probe is not None:
            self._probe.cancel()
        self.resume_writing()
        super().connection_lost(error)

    def crowded_out(self) -> None:
        """This spare connection has to make room for a newer one; a request that has arrived is answered first."""
        self.loop.call_later(LAST_LOOK_SECONDS, self._make_room)

    def _make_room(self) -> None:
        if not self.transport.is_closing():
            self._refuse(self._too_many())

    def _too_many(self):
        most, of_address = self.limits.max_connections, self.limits.max_address_connections
        problem = f"more than {most} connections, or {of_address} from one address"
        return ApiError(503, problem, code="connections_full", retry_after=1)

    def eof_received(self) -> bool:
        """The client sends no more. True keeps the connection open to answer a complete request; False closes it.

        A client that closed the whole connection looks the same until the server writes to it: see `_probe_client`.
        """
        waits = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if not waits or self._refused:
            return False
        self._has_ended.set()
        self._probe_client(PROBE_SECONDS)
        return True

    def _probe_client(self, seconds) -> None:
        """Finds out whether the client is still there, by interim responses until its answer begins."""
        if self.cycle.response_started or self.transport.is_closing():
            return
        # with pipelined requests an interim response would stand inside of an earlier answer
        if self.cycle.scope["http_version"] == "1.1" and not self.pipeline:
            self.transport.write(CONTINUE)
        self._probe = self.loop.call_later(seconds, self._probe_client, min(2 * seconds, LONGEST_PROBE))

    def pause_writing(self) -> None:
        """The client does not read its answer; the connection ends unless it reads again within `body_seconds`."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def data_received(self, data) -> None:
        """Called with received bytes. Refuses the connection once more than `max_header_bytes` of them completed no
        header and no part of a body."""
        if self._refused:
            return
        if self._is_in_head and self._timer is None:
            self._unset_keepalive_if_required()
            self._set_timer()
        self._has_progress = False
        super().data_received(data)
        self._num_pending = 0 if self._has_progress else self._num_pending + len(data)
        if not self._refused and max(self._num_pending, self._num_head_bytes) > self.limits.max_header_bytes:
            self._refuse_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_in_head, self._num_head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url) -> None:
        """A part of the path."""
        self._num_head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name, value) -> None:
        """A header; trailers after a chunked body are counted but not kept."""
        self._num_head_bytes += len(name) + len(value) + HEADER_COST
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers are complete. Too large or invalid ones are refused, and never become a request."""
        self._has_progress = True
        if self._num_head_bytes > self.limits.max_header_bytes or self._refused:
            return
        parser: Any = self.parser
        version = parser.get_http_version()
        problem = request_target.head_problem(parser.get_method(), version, self.url, self.headers)
        if problem is not None:
            self.send_400_response(problem)
            return
        expected = request_target.unknown_expectation(version, self.headers)
        if expected is not None:
            problem = f"Expect: only 100-continue can be expected here, got {request_target.quoted(expected)}"
            self._refuse(ApiError(417, problem, code="unknown_expectation"))
            return
        if self._is_spare and self.url.partition(b"?")[0] not in ALIVE:
            self._refuse(self._too_many())
            return
        self._is_in_head = False
        self._clear_timer()
        scope: Any = self.scope
        scope["lockstep.has_ended"] = self._has_ended
        super().on_headers_complete()
        self.cycle.keep_alive = self.cycle.keep_alive and not self._is_spare

    def on_body(self, body) -> None:
        """A part of a body."""
        self._has_progress = True
        if self._num_head_bytes <= self.limits.max_header_bytes and not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete; the next bytes belong to the next request."""
        self._has_progress = True
        if self._num_head_bytes > self.limits.max_header_bytes or self._refused:
            return
        if self.cycle.response_complete:
            self._clear_timer()
        self._is_in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer was sent; the rest of its request, where it has not arrived yet, gets `body_seconds`."""
        is_last = not self.pipeline
        super().on_response_complete()
        if self._has_ended.is_set() and is_last:
            self.transport.close()
        if self.cycle.more_body and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._set_timer()

    def _set_timer(self) -> None:
        self._timer = self.loop.call_later(self.limits.body_seconds, self._last_look)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _last_look(self) -> None:
        """Time is up. Where the whole process was stopped for a while, bytes that arrived meanwhile are read first."""
        self._timer = self.loop.call_later(LAST_LOOK_SECONDS, self._too_slow)

    def _too_slow(self) -> None:
        seconds = self.limits.body_seconds
        self._refuse(ApiError(408, f"the request did not arrive within {seconds:g} s", code="timeout"))

    def _refuse_head(self) -> None:
        limit = self.limits.max_header_bytes
        self._refuse(ApiError(431, f"the request's head is larger than {limit} bytes", code="headers_too_large"))

    def send_400_response(self, message) -> None:
        """Answers bytes that are not HTTP, and headers that are not valid."""
        self._refuse(ApiError(400, message, code="bad_http"))

    def _refuse(self, error) -> None:
        """Closes the connection, after an error response if the current request was not answered yet."""
        self._refused = True
        self._clear_timer()
        if self._is_unanswered():
            body = to_json(openai_shape(error))
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
            if error.retry_after is not None:
                head += b"retry-after: %d\r\n" % error.retry_after
            self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)
            self.request_log.refused(self._line(error))
        self.transport.close()
        self.loop.call_later(self.limits.body_seconds, self.transport.abort)  # where the client does not read it

    def _line(self, error: ApiError) -> RequestLine:
        """The line in the log for a request that was refused before the application saw it."""
        parser: Any = self.parser
        method, target = (parser.get_method(), self.url) if self._num_head_bytes else (b"-", b"")
        path = target.partition(b"?")[0].decode("ascii", "backslashreplace")
        client = self.client[0] if self.client else ""
        return RequestLine(method.decode("ascii"), path, error.status, error.code, client)

    def _is_unanswered(self):
        if self._is_in_head or self.cycle is None:
            return self.cycle is None or self.cycle.response_complete
        return not self.cycle.response_started
