"""Listening: the socket, uvicorn, and how a server ends."""

import asyncio
import contextlib
import errno
import resource
import signal
import socket
import threading
import time
from typing import Any

import uvicorn

from lockstep.serve.bounded_connection import bounded_protocol
from lockstep.serve.limits import Limits
from lockstep.serve.service import Service

BACKLOG = 1024
IDLE_SECONDS = 75  # how long a connection may wait for its next request
OWN_FILES = 256  # sockets that listen, models, caches, pipes
LAST_SECONDS = 5  # for answers that were cut off to reach their clients


def allow_files(limits: Limits) -> None:
    """Lets this process have a file open for each connection that there may be, beside its own.

    Else the system refuses connections, /health too, before they can be counted. ValueError where it may not have so
    many.
    """
    wanted = limits.max_connections + limits.spare_connections + OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ValueError(
                f"{limits.max_connections} connections need {wanted} open files, and this process may "
                f"have {hard} (ulimit -n)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on one port of every address of a host. "localhost" has 127.0.0.1 and ::1: clients try both.

    An address that this machine does not have is left out, unless none is left. ValueError, in one sentence, if that is
    not possible, such as where one of the addresses is in use.
    """
    made: list[socket.socket] = []
    try:
        _bind_all(made, _addresses(host), port)
    except (OSError, OverflowError) as error:
        for each in made:
            each.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {host} port {port}: {str(reason).lower()}") from None
    return made


def _addresses(host: str) -> list[tuple[int, tuple]]:
    """(family, socket address) of a host, each once, IPv4 first. OSError for a host that there is not."""
    if host.lower() == "localhost":
        return [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0))]
    found = [(each[0], each[4]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return sorted(dict.fromkeys(found), key=lambda each: each[0] != socket.AF_INET)


def _bind_all(made: list[socket.socket], addresses: list[tuple[int, tuple]], port: int) -> None:
    """Adds to `made` a socket for each address that this machine has. OSError where one cannot listen, or none is."""
    missing = None
    for family, (address, _, *scope) in addresses:
        try:
            one = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # no IPv6 here
            missing = error
            continue
        made.append(one)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and len(addresses) > 1:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            # port 0 is any free one for the first address, and that one for the others
            one.bind((address, made[0].getsockname()[1] if len(made) > 1 else port, *scope))
            one.listen(BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            missing = error
            made.pop().close()
    if not made and missing is not None:
        raise missing


class Server(uvicorn.Server):
    """A server of an application and its Service. The first signal drains it, the second ends it at once.

    A terminal that closes only drains it, however often it says so. Where it is ignored (nohup), it still is.
    """

    def __init__(self, app, service: Service) -> None:
        quiet: dict[str, Any] = dict(log_config=None, log_level="error", access_log=False, server_header=False)
        times: dict[str, Any] = dict(timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=LAST_SECONDS)
        parts: dict[str, Any] = dict(loop="asyncio", ws="none", lifespan="on", http=bounded_protocol(service.limits))
        super().__init__(uvicorn.Config(app, backlog=BACKLOG, **parts, **quiet, **times))
        self._service, self._drained_by = service, None

    @contextlib.contextmanager
    def capture_signals(self):
        """Inside, signals are handled by `handle_exit`."""
        with contextlib.ExitStack() as stack:
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                stack.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, self.handle_exit))
            stack.enter_context(super().capture_signals())
            yield

    def handle_exit(self, sig, frame) -> None:
        """A signal: new requests are refused from now on, those that run may end in their time."""
        if self._drained_by is None:
            self._service.drain()
            self._drained_by = time.monotonic() + self._service.limits.drain_seconds
        elif sig != signal.SIGHUP:  # which comes twice from some shells
            self._drained_by = 0.0

    async def on_tick(self, counter):
        """Called ten times a second; True ends the server."""
        if self._drained_by is not None and (not self._service.num_open or time.monotonic() > self._drained_by):
            self._service.cut_off()
            await asyncio.sleep(0)
            self.should_exit = True
        return await super().on_tick(counter)
