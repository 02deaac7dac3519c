"""What starts replicas: as processes of this machine (LocalCarrier), or elsewhere (`ray_carrier`)."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from typing import Any, Protocol

WORKER = "lockstep.replicas.worker"
CLOSE_SECONDS = 20  # for a replica to write its prefix cache to disk


class Carried(Protocol):
    """A replica that was started. connection: to it, or what will be one; place: where it runs, for people."""

    connection: Any  # a multiprocessing Connection
    place: str

    def kill(self) -> None:
        """Ends the replica at once, whatever it does."""
        ...

    def why(self) -> str:
        """Why it ended, after its connection has: a few words."""
        ...

    def wait(self, seconds: float) -> None:
        """Waits until the replica has ended; kills one that does not within some seconds."""
        ...


class Carrier(Protocol):
    """Starts replicas."""

    def start(self, number: int, settings: Mapping[str, Any]) -> Carried:
        """Starts replica `number`. settings: see `worker.run_replica`. OSError or ValueError where it cannot."""
        ...

    def close(self) -> None:
        """After the end of all replicas."""
        ...


class LocalProcess(Carried):
    """A replica in a process of this machine, in a session of its own: Ctrl-C in a terminal does not reach it. module:
    what it runs."""

    def __init__(self, settings: Mapping[str, Any], module: str = WORKER) -> None:
        self.connection: Any  # of the two classes that `Pipe` may give
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", module, str(theirs.fileno())]
        quiet: dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], **quiet)
        self.place = f"process {self._process.pid}"
        self.connection.send(dict(settings))

    def kill(self) -> None:
        """Ends the process at once, whatever it does."""
        self._process.kill()

    def why(self) -> str:
        """How the process ended."""
        self.wait(CLOSE_SECONDS)
        code = self._process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def wait(self, seconds: float) -> None:
        """Waits until the process has ended; kills one that does not within some seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class LocalCarrier(Carrier):
    """Starts replicas as processes of this machine."""

    def start(self, number: int, settings: Mapping[str, Any]) -> LocalProcess:
        """Starts replica `number`. OSError where the system has no room for a process."""
        return LocalProcess(settings)

    def close(self) -> None:
        """Nothing is left after the end of all replicas."""
