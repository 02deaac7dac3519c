"""Replicas carried by Ray (https://www.ray.io): actors on the machines of a cluster. The only file that imports ray.

Ray places the actors and starts their processes; tokens do not go through it. Each actor connects to the front, so that
all its streams share one message a step, and the end of a process is seen as fast as on this machine. Whoever can reach
the front's port needs its key: front and replicas are one trust domain, as a Ray cluster is.
"""

import importlib
import logging
import os
import secrets
import threading
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from typing import Any

from lockstep.replicas.carrier import Carried, Carrier

LOCAL, LOOPBACK = "local", "127.0.0.1"
START_SECONDS = 120  # for an actor to be placed and to connect
OBJECT_STORE_BYTES = 100 << 20  # the least that Ray takes: nothing is kept in it
KEY_BYTES = 32
# no report of use to Ray's makers; none of the texts that Ray prints about workers that ended, which the fleet logs
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Placed(Carried):
    """A replica in an actor. connection: a socket to it."""

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
        """Ends the actor. Its last words are read by the connection's end, so nothing is waited for twice."""
        self.kill()


class RayCarrier(Carrier):
    """Starts replicas as actors of a Ray cluster. address: "local" starts a cluster of this process on this machine's
    loopback interface; "auto" or HOST:PORT joins one that runs. ValueError where Ray is not installed or the cluster
    cannot be reached.

    cores: of each actor, by which Ray places them; None: an equal share of each machine is not asked for.
    """

    def __init__(self, address: str = LOCAL, cores: float | None = None) -> None:
        self._ray, self._cores = connected(address), cores
        host = LOOPBACK if address == LOCAL else self._ray.util.get_node_ip_address()
        self._key = secrets.token_bytes(KEY_BYTES)
        self._listener = Listener((host, 0), "AF_INET", authkey=self._key)
        self._starting = threading.Lock()

    def start(self, number: int, settings: Mapping[str, Any]) -> Placed:
        """Starts replica `number` on a machine that Ray chooses. ValueError where none has room, or it does not
        connect."""
        with self._starting:  # one connects at a time, so that it is known which
            options = dict(max_restarts=0, max_task_retries=0, num_cpus=self._cores or 0, max_concurrency=2)
            actor = self._ray.remote(**options)(Actor).remote()
            try:
                where = self._ray.get(actor.where.remote(), timeout=START_SECONDS)
                actor.run.remote(self._listener.address, self._key, dict(settings))
                connection = self._listener.accept()
            except (self._ray.exceptions.RayError, AuthenticationError, OSError) as error:
                self._ray.kill(actor, no_restart=True)
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"Ray did not start it: {text}") from None
        return Placed(self._ray, actor, connection, where)

    def close(self) -> None:
        """Leaves the cluster; ends one that was started here."""
        self._listener.close()
        self._ray.shutdown()


class Actor:
    """What Ray runs: a replica that connects to its front."""

    def where(self) -> str:
        """Where it runs, for people."""
        return f"process {os.getpid()} of {os.uname().nodename}"

    def run(self, address: tuple[str, int], key: bytes, settings: dict[str, Any]) -> None:
        """Runs until the front ends it, or the connection does; then the process ends."""
        from lockstep.replicas.worker import run_replica

        try:
            run_replica(Client(address, "AF_INET", authkey=key), settings)
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
        raise ValueError("--ray needs Ray, which is not installed: pip install 'lockstep-llm[ray]'") from None
    quiet: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
    try:
        if address == LOCAL:
            ray.init(
                include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _node_ip_address=LOOPBACK, **quiet
            )
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--ray {address}: cannot reach a Ray cluster there: {text}") from None
    return ray
