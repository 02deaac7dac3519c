"""Connections with bounds that uvicorn does not set: sizes of heads, connections in all, time for what arrives."""
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lockstep.serve.http.encode import to_json
from lockstep.serve.http.errors import ApiError, openai_shape

LAST_LOOK_SECONDS = 0.05
HEADER_COST = 32  # bytes that a header counts beside its own


def bounded_protocol(limits):
    """The class of uvicorn's protocol for these limits."""
    return type("Bounded", (BoundedProtocol,), {"limits": limits})


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with httptools' parser, held to `limits`, an attribute of the class."""

    def connection_made(self, transport):
        """Takes a connection, or answers 503 at once if there are too many."""
        super().connection_made(transport)
        # bytes of the head so far, and bytes since anything became of them
        self._num_head_bytes, self._num_pending = 0, 0
        self._timer, self._stalled, self._is_in_head, self._has_progress, self._refused = None, None, True, False, False
        if len(self.connections) > self.limits.max_connections:
            self._refuse(ApiError(503, f"more than {self.limits.max_connections} connections", code="connections_full"))
        else:
            self._set_timer()

    def connection_lost(self, error):
        """The connection is gone."""
        self._clear_timer()
        self.resume_writing()
        super().connection_lost(error)

    def pause_writing(self):
        """The client does not read what it asked for; it must go on in time."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self):
        """The client reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def data_received(self, data):
        """Takes bytes in. What grows without becoming a header or a part of a body is bounded here."""
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

    def on_message_begin(self):
        """A request begins."""
        self._is_in_head, self._num_head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url):
        """A part of the path."""
        self._num_head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name, value):
        """A header; trailers after a body in chunks are counted, and not kept."""
        self._num_head_bytes += len(name) + len(value) + HEADER_COST
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self):
        """A head is there; one that is too large never becomes a request."""
        self._has_progress = True
        if self._num_head_bytes > self.limits.max_header_bytes:
            return
        self._is_in_head = False
        self._clear_timer()
        super().on_headers_complete()

    def on_body(self, body):
        """A part of a body."""
        self._has_progress = True
        if self._num_head_bytes <= self.limits.max_header_bytes:
            super().on_body(body)

    def on_message_complete(self):
        """The end of a request. What follows belongs to the next one."""
        self._has_progress = True
        if self._num_head_bytes > self.limits.max_header_bytes:
            return
        if self.cycle.response_complete:
            self._clear_timer()
        self._is_in_head = True
        super().on_message_complete()

    def on_response_complete(self):
        """An answer was sent; the rest of its request, if it has not come, must not take for ever."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._set_timer()

    def _set_timer(self):
        self._timer = self.loop.call_later(self.limits.body_seconds, self._last_look)

    def _clear_timer(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _last_look(self):
        """Time is up; but where the whole process was stopped, what came meanwhile has yet to be read."""
        self._timer = self.loop.call_later(LAST_LOOK_SECONDS, self._too_slow)

    def _too_slow(self):
        seconds = self.limits.body_seconds
        self._refuse(ApiError(408, f"the request did not arrive within {seconds:g} s", code="timeout"))

    def _refuse_head(self):
        limit = self.limits.max_header_bytes
        self._refuse(ApiError(431, f"the request's head is larger than {limit} bytes", code="headers_too_large"))

    def send_400_response(self, message):
        """Answers what is not HTTP."""
        self._refuse(ApiError(400, message, code="bad_http"))

    def _refuse(self, error):
        """Closes the connection, with an answer if the request that arrives has none yet."""
        self._refused = True
        self._clear_timer()
        if self._is_unanswered():
            body = to_json(openai_shape(error))
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()
        self.loop.call_later(self.limits.body_seconds, self.transport.abort)  # where nobody takes the answer

    def _is_unanswered(self):
        if self._is_in_head:
            return self.cycle is None or self.cycle.response_complete
        return not self.cycle.response_started
