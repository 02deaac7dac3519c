"""The sockets to listen on, the uvicorn server, and its shutdown."""

import asyncio
import contextlib
import errno
import logging
import resource
import signal
import socket
import threading
import time
from typing import Any

import uvicorn

from lockstep.engine.async_engine import StreamEngine
from lockstep.serve.bounded_connection import bounded_protocol
from lockstep.serve.limits import Limits
from lockstep.serve.loading import Loading
from lockstep.serve.service import Service

BACKLOG = 1024
IDLE_SECONDS = 75  # how long a connection may wait for its next request
OWN_FILES = 256  # open files besides connections: listening sockets, models, caches, pipes
LAST_SECONDS = 5  # for the last bytes of interrupted answers to reach their clients
log = logging.getLogger("lockstep.http")


def raise_open_file_limit(limits: Limits) -> None:
    """Raises this process's limit of open files to one for each connection, plus OWN_FILES.

    Otherwise the system refuses connections, those to /health too, before the server can count them. ValueError where
    the system's hard limit is too low.
    """
    needed = limits.max_connections + limits.spare_connections + OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(
                f"{limits.max_connections} connections need {needed} open files, and this process may "
                f"have {hard} (ulimit -n)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on the same port of every address of a host; "localhost" means 127.0.0.1 and ::1.

    Addresses that this machine does not have are left out. ValueError, in one sentence, where an address is in use or
    none can be listened on.
    """
    sockets: list[socket.socket] = []
    try:
        _bind_all(sockets, _addresses(host), port)
    except (OSError, OverflowError) as error:
        for each in sockets:
            each.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {host} port {port}: {str(reason).lower()}") from None
    return sockets


def _addresses(host: str) -> list[tuple[int, tuple]]:
    """(family, socket address) of a host, each once, IPv4 first. OSError for an unknown host."""
    if host.lower() == "localhost":
        return [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0))]
    found = [(each[0], each[4]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return sorted(dict.fromkeys(found), key=lambda each: each[0] != socket.AF_INET)


def _bind_all(sockets: list[socket.socket], addresses: list[tuple[int, tuple]], port: int) -> None:
    """Adds to `sockets` a listening one for each address that this machine has. OSError where one cannot listen, or
    this machine has none of the addresses."""
    missing = None
    for family, (address, _, *scope) in addresses:
        try:
            listener = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # this machine has no IPv6
            missing = error
            continue
        sockets.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and len(addresses) > 1:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            # with port 0 the system chooses a port for the first address, and the other addresses get the same port
            listener.bind((address, sockets[0].getsockname()[1] if len(sockets) > 1 else port, *scope))
            listener.listen(BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            missing = error
            sockets.pop().close()
    if not sockets and missing is not None:
        raise missing


def _replace(engine: StreamEngine) -> None:
    try:
        engine.restart()
    except ValueError as error:
        log.warning("SIGUSR1: %s", error)


class Server(uvicorn.Server):
    """A uvicorn server of an application and its Service. The first signal drains it, the second ends it at once.

    SIGHUP, from a terminal that closes, only drains it, even if it comes twice; under nohup SIGHUP stays ignored.
    SIGUSR1 replaces its replicas by fresh ones, while all answers go on.
    loading: loads the model, from `run` on. Until it has, any of these signals ends the process; an error of it ends
    the server.
    """

    def __init__(self, app, service: Service, loading: Loading | None = None) -> None:
        quiet: dict[str, Any] = dict(log_config=None, log_level="error", access_log=False, server_header=False)
        times: dict[str, Any] = dict(timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=LAST_SECONDS)
        protocol = bounded_protocol(service.limits, service.request_log)
        parts: dict[str, Any] = dict(loop="asyncio", ws="none", lifespan="on", http=protocol)
        super().__init__(uvicorn.Config(app, backlog=BACKLOG, **parts, **quiet, **times))
        self._service, self._loading, self._drained_by = service, loading, None

    @contextlib.contextmanager
    def capture_signals(self):
        """A context in which `handle_exit` handles SIGINT, SIGTERM and SIGHUP, and the model is loaded."""
        with contextlib.ExitStack() as stack:
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                stack.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, self.handle_exit))
            if is_main:
                stack.callback(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, self.handle_restart))
            stack.enter_context(super().capture_signals())
            if self._loading is not None:
                self._loading.start()
            yield

    def handle_restart(self, sig, frame) -> None:
        """Replaces the replicas, one after the other, beside the event loop."""
        if self._service.engine is not None:
            threading.Thread(target=_replace, args=[self._service.engine], name="lockstep restart", daemon=True).start()

    def handle_exit(self, sig, frame) -> None:
        """On the first signal new requests are refused, and running ones get `drain_seconds` to complete."""
        if self._loading is not None and self._loading.is_under_way:
            self._loading.end_process(sig)
        if self._drained_by is None:
            self._service.drain()
            seconds, num_open = self._service.limits.drain_seconds, self._service.num_open
            still = f"{num_open} requests are answered for up to {seconds:g} s more" if num_open else "the server ends"
            log.info("%s: %s", signal.Signals(sig).name, still)
            self._drained_by = time.monotonic() + self._service.limits.drain_seconds
        elif sig != signal.SIGHUP:  # some shells send SIGHUP twice
            self._drained_by = 0.0

    async def on_tick(self, counter):
        """uvicorn calls this ten times a second; True ends the server."""
        self._service.request_log.tick(self._service.num_open)
        if self._drained_by is not None and (not self._service.num_open or time.monotonic() > self._drained_by):
            self._service.cut_off()
            await asyncio.sleep(0)
            self.should_exit = True
        self.should_exit |= self._loading is not None and self._loading.error is not None
        return await super().on_tick(counter)
