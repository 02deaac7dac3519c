"""Jobs in a process that may be ended, so that none takes time, memory or this process from anybody else."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from lockstep.text.job_server import OUTSIDE, REFUSAL, Ended, receive, send

WAIT_SECONDS = 15.0  # for a process that is kept from working
# variables that Python starts with; keys and tokens are not among them
KEPT = """PATH LANG LC_ALL LC_CTYPE TZ TZDIR PYTHONHOME LD_LIBRARY_PATH DYLD_LIBRARY_PATH
    DYLD_FALLBACK_LIBRARY_PATH""".split()


class Busy(Exception):
    """Too much else is being done: the same may be asked later. code: for programs, which of it."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class JobProcess:
    """Another process, which is started with the first order and ends with this object, or with this process.

    module: of lockstep, whose `main` calls job_server.serve. about: what it is told first. name: what it works at, in
    messages and codes, such as "grammars". max_idle: copies of it that are kept for further orders. Any thread may use
    it, and so may a process that was forked: it starts one of its own.
    """

    def __init__(self, module: str, name: str, about: bytes = b"", max_idle: int = 0) -> None:
        self._module, self._name, self._about, self._max_idle = module, name, about, max_idle
        self.process_id: int | None = None
        self._forget()

    def _forget(self) -> None:
        """Begins anew. What this process has inherited, where it was forked, belongs to the other one."""
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._control: socket.socket | None = None
        self._end: weakref.finalize | None = None
        self._idle: list[tuple[socket.socket, socket.socket]] = []  # copies, each with what led to it

    def ask(self, order: bytes) -> bytearray:
        """The answer to an order. Where the process was ended from outside another one is asked.

        ValueError where the order is refused, or too large; Ended if it reached a limit; Busy where there is no answer
        in time.
        """
        for _ in range(2 + self._max_idle):
            control = None
            try:
                control = self.start()
                control, job = self._copy(control)
                return self._answer(control, job, order)
            except TimeoutError:
                raise Busy(
                    f"the process for {self._name} gave no answer in {WAIT_SECONDS:g} s", f"{self._name}_busy"
                ) from None
            except OSError:
                self._leave(control)
            except Ended as ended:
                if ended.signal not in OUTSIDE:
                    raise
        raise RuntimeError(f"the process for {self._name} ended")

    def _copy(self, control: socket.socket) -> tuple[socket.socket, socket.socket]:
        """A copy that takes orders, with what led to it. OSError if there is none any more."""
        with self._lock:
            while self._idle:
                found = self._idle.pop()
                if _is_quiet(found[1]):
                    return found
                found[1].close()
            _, descriptors, *_ = socket.recv_fds(control, 1, 1)
            if not descriptors:
                raise ConnectionError("the other side ended")
            job = socket.socket(fileno=descriptors[0])
            control.sendall(b"c")  # for the next
            return control, job

    def _answer(self, control, job, order):
        with contextlib.ExitStack() as stack:
            stack.enter_context(job)
            job.settimeout(WAIT_SECONDS)
            send(job, order)
            answer, mark = receive(job)
            with self._lock:
                if len(self._idle) < self._max_idle:
                    self._idle.append((control, job))
                    stack.pop_all()
        if mark == REFUSAL:
            raise ValueError(answer.decode("utf-8", "surrogatepass"))
        return answer

    def start(self) -> socket.socket:
        """Starts the process if it is not there, so that the first order does not wait; returns what leads to it.

        OSError if it ends at once.
        """
        if self._owner != os.getpid():
            if self._end is not None:
                self._end.detach()
            self._forget()
        with self._lock:
            if self._control is None:
                self._control, process = _started(self._module)
                self.process_id, self._end = process.pid, weakref.finalize(self, _end, self._control, process)
                try:
                    send(self._control, self._about)
                except OSError:
                    self._drop()
                    raise
            return self._control

    def _leave(self, control) -> None:
        """Ends a process that has ended or does not follow, unless another thread did."""
        with self._lock:
            if self._control is control and control is not None:
                self._drop()

    def _drop(self) -> None:
        if self._end is not None:
            self._end()
        self._control = self._end = None

    def close(self) -> None:
        """Ends the process; the next order starts another one."""
        if self._owner == os.getpid():
            self._leave(self._control)
            with self._lock:
                while self._idle:
                    self._idle.pop()[1].close()


def _is_quiet(job: socket.socket) -> bool:
    """Whether a copy that waits for an order is still there: else it would say so."""
    job.settimeout(0)
    try:
        job.recv(1)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _started(module: str) -> tuple[socket.socket, subprocess.Popen]:
    control, other = socket.socketpair()
    control.settimeout(WAIT_SECONDS)
    root = Path(__file__).parents[2]
    path = [str(root), *filter(os.path.isabs, sys.path)]
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    command = [sys.executable, "-P", "-m", module]  # -P: nothing comes from the current folder
    with other:  # in a session of its own: what a terminal sends to this process is not for that one
        process = subprocess.Popen(
            command,
            stdin=other.fileno(),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=kept | {"PYTHONPATH": os.pathsep.join(path)},
        )
    return control, process


def _end(control: socket.socket, process: subprocess.Popen) -> None:
    control.close()  # which it takes as its end
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
