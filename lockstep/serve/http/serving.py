"""Listening: the socket, uvicorn, and how a server ends."""
import asyncio
import socket
import time

import uvicorn

from lockstep.serve.http.protocol import bounded_protocol

BACKLOG = 1024
IDLE_SECONDS = 75  # how long a connection may wait for its next request
LAST_SECONDS = 5  # for answers that were cut off to reach their clients


def bind(host, port):
    """A socket that listens. ValueError, in one sentence, if that is not possible."""
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        if made is not None:
            made.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {host} port {port}: {str(reason).lower()}") from None
    return made


class Server(uvicorn.Server):
    """A server of an application and its Service. The first signal drains it, the second ends it at once."""

    def __init__(self, app, service):
        quiet = dict(log_config=None, log_level="error", access_log=False, server_header=False)
        times = dict(timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=LAST_SECONDS)
        super().__init__(uvicorn.Config(app, loop="asyncio", http=bounded_protocol(service.limits), ws="none",
                                        lifespan="on", backlog=BACKLOG, **quiet, **times))
        self._service, self._drained_by = service, None

    def handle_exit(self, sig, frame):
        """A signal: new requests are refused from now on, those that run may end in their time."""
        if self._drained_by is None:
            self._service.drain()
            self._drained_by = time.monotonic() + self._service.limits.drain_seconds
        else:
            self._drained_by = 0.0

    async def on_tick(self, counter):
        """Called ten times a second; True ends the server."""
        if self._drained_by is not None and (not self._service.num_open or time.monotonic() > self._drained_by):
            self._service.cut_off()
            await asyncio.sleep(0)
            self.should_exit = True
        return await super().on_tick(counter)
