"""Jobs in a process that may be ended, so that none takes time, memory or this process from anybody else."""
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from lockstep.serve.job_server import OUTSIDE, Ended, receive, send

WAIT_SECONDS = 15.0  # for a process that is kept from working
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
        "DYLD_FALLBACK_LIBRARY_PATH")  # variables that Python starts with; keys and tokens are not among them


class Busy(Exception):
    """Too much else is being done: the same may be asked later. code: for programs, which of it."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class JobProcess:
    """Another process, which is started with the first order and ends with this object, or with this process.

    module: of lockstep, whose `main` calls job_server.serve. about: what it is told first. name: what it works at, in
    messages and codes, such as "grammars". Any thread may use it, and so may a process that was forked: it starts one
    of its own.
    """

    def __init__(self, module: str, name: str, about: bytes = b""):
        self._module, self._name, self._about = module, name, about
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._control = self._end = None
        self.process_id: int | None = None

    def ask(self, order: bytes) -> bytearray:
        """The answer to an order. Where the process was ended from outside another one is asked.

        Ended if the order reached a limit; Busy where there is no answer in time; ValueError for one that is too large.
        """
        for _ in range(2):
            control = self.start()
            try:
                with self._copy(control) as job:
                    job.settimeout(WAIT_SECONDS)
                    send(job, order)
                    return receive(job)
            except TimeoutError:
                raise Busy(f"the process for {self._name} gave no answer in {WAIT_SECONDS:g} s",
                           f"{self._name}_busy") from None
            except OSError:
                self._leave(control)
            except Ended as ended:
                if ended.signal not in OUTSIDE:
                    raise
        raise RuntimeError(f"the process for {self._name} ended")

    def _copy(self, control: socket.socket) -> socket.socket:
        """A socket to a process that takes one order. OSError if there is none any more."""
        with self._lock:
            _, descriptors, *_ = socket.recv_fds(control, 1, 1)
            if not descriptors:
                raise ConnectionError("the other side ended")
            job = socket.socket(fileno=descriptors[0])
            control.sendall(b"c")  # for the next
            return job

    def start(self) -> socket.socket:
        """Starts the process if it is not there, so that the first order does not wait; returns what leads to it."""
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            if self._control is None:
                self._control, process = _started(self._module)
                self.process_id, self._end = process.pid, weakref.finalize(self, _end, self._control, process)
                send(self._control, self._about)
            return self._control

    def _forget(self):
        """Leaves to the process that this one was forked from what belongs to it."""
        if self._end is not None:
            self._end.detach()
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._control = self._end = None

    def _leave(self, control):
        """Ends a process that has ended or does not follow, unless another thread did."""
        with self._lock:
            if self._control is control:
                self._end()
                self._control = self._end = None

    def close(self) -> None:
        """Ends the process; the next order starts another one."""
        if self._owner == os.getpid():
            self._leave(self._control)


def _started(module: str) -> tuple[socket.socket, subprocess.Popen]:
    control, other = socket.socketpair()
    control.settimeout(WAIT_SECONDS)
    root = Path(__file__).parents[2]
    path = [str(root), *filter(os.path.isabs, sys.path)]
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | {"PYTHONPATH": os.pathsep.join(path)}
    with other:  # -P: not from the folder that we are in. In a session of its own: a terminal's Ctrl-C is not for it
        process = subprocess.Popen([sys.executable, "-P", "-m", module], stdin=other, stdout=subprocess.DEVNULL,
                                   env=environment, start_new_session=True)
    return control, process


def _end(control: socket.socket, process: subprocess.Popen) -> None:
    control.close()  # which it takes as its end
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
