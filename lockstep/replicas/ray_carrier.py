"""Replicas and other work carried by Ray (https://www.ray.io): actors on the machines of a cluster. The only file that
imports ray.

Ray places the actors and starts their processes; tokens do not go through it. Each actor connects to the process that
started it, so that all streams of a replica share one message a step, and its end is seen as fast as on this machine.
Whoever can reach the port needs its key: all these processes are one trust domain, as a Ray cluster is.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

from lockstep.replicas.carrier import Carried, Carrier
from lockstep.replicas.worker import run_replica

LOCAL, LOOPBACK = "local", "127.0.0.1"
START_SECONDS, REACH_SECONDS = 120, 5  # for an actor to be placed and to connect; for a cluster to be reached
END_SECONDS = 10  # for a cluster to end
OBJECT_STORE_BYTES = 100 << 20  # the least that Ray takes: nothing is kept in it
SIGACTION_BYTES = 512  # more than a sigaction has anywhere
KEY_BYTES, GREETING_SECONDS = 32, 10  # of the secret of front and replicas; for one to show that it knows it
# no report of use to Ray's makers; none of the texts that Ray prints about workers that ended, which the fleet logs
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_raylet_start_wait_time_s": "120",  # machines are busy when a server starts
    "RAY_worker_niceness": "0",  # or its front, and all else, would go before a replica
}


class Placed(Carried):
    """A function that runs in an actor. connection: a socket to it."""

    def __init__(self, ray: Any, actor: Any, connection: Any, place: str) -> None:
        self._ray, self._actor = ray, actor
        self.connection, self.place = connection, place
        self._was_killed = False

    def kill(self) -> None:
        """Ends the actor's process at once."""
        self._was_killed = True
        self._ray.kill(self._actor, no_restart=True)

    def why(self) -> str:
        """How it ended, as far as Ray lets know."""
        return "killed" if self._was_killed else "its process or its machine ended"

    def wait(self, seconds: float) -> None:
        """Waits until the actor has ended its connection, for at most some seconds; then kills it."""
        with contextlib.suppress(EOFError, OSError):
            deadline = time.monotonic() + seconds
            while self.connection.poll(max(0.0, deadline - time.monotonic())):
                self.connection.recv()
        self.kill()


class RayCluster:
    """Runs functions in actors. address: "local" starts a cluster of this process on this machine's loopback interface;
    "auto" or HOST:PORT joins one that runs. ValueError where Ray is not installed or the cluster cannot be reached.
    """

    def __init__(self, address: str = LOCAL) -> None:
        self._is_local, self._ends = address == LOCAL, threading.Event()
        self._ray = self._connected(address)
        host = LOOPBACK if self._is_local else self._ray.util.get_node_ip_address()
        self._key, self._door = secrets.token_bytes(KEY_BYTES), socket.create_server((host, 0))
        self._door.settimeout(START_SECONDS)
        self._starting = threading.Lock()

    def _connected(self, address: str) -> Any:
        """The module ray, connected in a thread that lives until `close`: the processes of a cluster end with the
        thread that started it."""
        found: Future[Any] = Future()

        def live() -> None:
            try:
                found.set_result(connected(address))
            except BaseException as error:
                found.set_exception(error)
            else:
                self._ends.wait()
                found.result().shutdown()

        self._life = threading.Thread(target=live, name="lockstep ray", daemon=True)
        self._life.start()
        return found.result()

    def start(self, function: Callable[..., object], *args: Any, cores: int) -> Placed:
        """Runs function(connection, *args), which a module has under its name, on a machine that Ray chooses. cores:
        that it needs of a cluster that is not this machine's own. ValueError where none has room, or it does not
        connect."""
        cores, errors = 0 if self._is_local else cores, self._ray.exceptions
        with self._starting:  # one connects at a time, so that it is known which
            options = dict(max_restarts=0, max_task_retries=0, num_cpus=cores, max_concurrency=2)
            actor = self._ray.remote(**options)(Actor).remote()
            try:
                where = self._ray.get(actor.where.remote(), timeout=START_SECONDS)
                actor.run.remote(self._door.getsockname(), self._key, function, args)
                return Placed(self._ray, actor, self._accept(), where)
            except errors.GetTimeoutError:
                reason = f"no machine of the cluster had {cores} free cores within {START_SECONDS} s"
            except (errors.RayError, OSError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._ray.kill(actor, no_restart=True)
            raise ValueError(f"Ray did not start it: {reason}")

    def _accept(self) -> "Connection[Any, Any]":
        """The connection of the actor that knows the key. OSError where none comes in time."""
        while True:
            visitor, _ = self._door.accept()
            visitor.settimeout(None)
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", GREETING_SECONDS, 0))
            visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection: Connection[Any, Any] = Connection(os.dup(visitor.fileno()))
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
            except (AuthenticationError, EOFError, OSError):
                connection.close()
                continue
            finally:
                visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
                visitor.close()
            return connection

    def close(self) -> None:
        """Leaves the cluster; ends one that was started here."""
        self._door.close()
        self._ends.set()
        self._life.join(END_SECONDS)


class RayCarrier(Carrier):
    """Starts replicas as actors of a Ray cluster. address: see RayCluster; in one that runs, each asks for as many
    cores as it has threads."""

    def __init__(self, address: str = LOCAL) -> None:
        self._cluster = RayCluster(address)

    def start(self, number: int, settings: Mapping[str, Any]) -> Placed:
        """Starts replica `number`. ValueError where Ray cannot."""
        return self._cluster.start(run_replica, dict(settings), cores=settings["threads"])

    def close(self) -> None:
        """Leaves the cluster."""
        self._cluster.close()


class Actor:
    """What Ray runs: a function with a connection to the process that started it."""

    def where(self) -> str:
        """Where it runs, for people."""
        return f"process {os.getpid()} of {os.uname().nodename}"

    def run(self, address: tuple[str, int], key: bytes, function: Callable[..., object], args: Sequence[Any]) -> None:
        """Runs the function until it returns or the connection ends; then the process ends."""
        try:
            function(Client(address, "AF_INET", authkey=key), *args)
        except (EOFError, OSError):
            pass
        os._exit(0)


def connected(address: str) -> Any:
    """The module ray, connected to a cluster, with its noise kept out of the terminal. ValueError where it cannot."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--ray: Ray is not installed: pip install '.[ray]'") from None
    if ray.is_initialized():  # within a cluster's own process
        return ray
    _check_address(address)
    try:
        with _own_handler(signal.SIGTERM):
            _init(ray, address)
    except Exception as error:  # Ray raises classes of all kinds, plain Exception among them
        raise ValueError(f"--ray {address}: {_reason(error, address)}") from None
    return ray


def _init(ray: Any, address: str) -> None:
    quiet: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
    if address == LOCAL:
        ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _node_ip_address=LOOPBACK, **quiet)
    else:
        ray.init(address=address, **quiet)


def _reason(error: Exception, address: str) -> str:
    """Why Ray did not start, or its cluster was not reached: one line."""
    if address == "auto" and isinstance(error, ConnectionError):
        return "no Ray cluster runs on this machine"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{'Ray did not start' if address == LOCAL else 'cannot reach a Ray cluster there'}: {text}"


@contextlib.contextmanager
def _own_handler(number: signal.Signals) -> Iterator[None]:
    """Keeps this process's handler of a signal: Ray installs one that prints a stack. Any thread may do that, which
    Python's `signal.signal` does not allow."""
    libc, action = ctypes.CDLL(None), ctypes.create_string_buffer(SIGACTION_BYTES)
    libc.sigaction(number, None, action)
    try:
        yield
    finally:
        libc.sigaction(number, action, None)


def _check_address(address: str) -> None:
    """ValueError for an address where nobody listens: Ray itself would try for minutes."""
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"--ray: expected local, auto or HOST:PORT, got {address!r:.80}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"--ray {address}: cannot reach a Ray cluster there: {reason}") from None
