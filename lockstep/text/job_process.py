"""A worker process for untrusted jobs, such as rendering a checkpoint's chat template: it can be killed.

So a job that loops, fills the memory or crashes costs other requests nothing. This file is the side that asks;
job_server.py is the worker's side.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from lockstep.text.job_server import OUTSIDE, REFUSAL, Ended, receive, send

WAIT_SECONDS = 15.0  # timeout for an answer: the worker may get no processor time on a busy machine
# environment variables that Python needs to start; API keys and tokens are not passed on
KEPT_VARIABLES = """PATH LANG LC_ALL LC_CTYPE TZ TZDIR PYTHONHOME LD_LIBRARY_PATH DYLD_LIBRARY_PATH
    DYLD_FALLBACK_LIBRARY_PATH""".split()


class Busy(RuntimeError):
    """The machine is too busy; the same request may succeed later, so this is no ValueError. code: the cause, for
    programs: "grammars_busy"."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class JobProcess:
    """A worker process. It starts with the first order (a job's input) and ends with this object or this process.

    The process itself runs no job: it forks a copy of itself for each, with limits on time and memory.

    module: a module of lockstep that, run as a program, calls job_server.serve. about: bytes that are sent to it first.
    name: in messages and codes, such as "grammars". max_idle: how many forked copies are kept for further orders. Any
    thread may use this object. So may a forked child of this process, which starts a worker process of its own.
    """

    def __init__(self, module: str, name: str, about: bytes = b"", max_idle: int = 0) -> None:
        self._module, self._name, self._about, self._max_idle = module, name, about, max_idle
        self.process_id: int | None = None
        self._reset()

    def _reset(self) -> None:
        """Resets to "not started". After a fork, the inherited worker and sockets belong to the parent process."""
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._control: socket.socket | None = None
        self._end: weakref.finalize | None = None
        self._idle: list[tuple[socket.socket, socket.socket]] = []  # (control, job) sockets of idle copies

    def ask(self, order: bytes) -> bytearray:
        """The answer to an order. If the worker was killed from outside, another one is asked.

        ValueError if the job refuses the order, or the order is too large; Ended if the job reached its limit of time
        or memory; Busy after WAIT_SECONDS without an answer.
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
        """The (control, job) sockets of a copy that takes orders. OSError if the worker process has ended."""
        with self._lock:
            while self._idle:
                idle = self._idle.pop()
                if _is_quiet(idle[1]):
                    return idle
                idle[1].close()
            _, descriptors, *_ = socket.recv_fds(control, 1, 1)
            if not descriptors:
                raise ConnectionError("the other side ended")
            job = socket.socket(fileno=descriptors[0])
            control.sendall(b"c")  # asks for a further copy, to be ready for the next order
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
        """Starts the worker process if it does not run, and returns its control socket. Called early, this spares the
        first order the wait. OSError if the process ends at once."""
        if self._owner != os.getpid():
            if self._end is not None:
                self._end.detach()
            self._reset()
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
        """Ends the worker process behind this socket, which does not respond, unless another thread has done so."""
        with self._lock:
            if self._control is control and control is not None:
                self._drop()

    def _drop(self) -> None:
        if self._end is not None:
            self._end()
        self._control = self._end = None

    def close(self) -> None:
        """Ends the worker process; the next order would start another one."""
        if self._owner == os.getpid():
            self._leave(self._control)
            with self._lock:
                while self._idle:
                    self._idle.pop()[1].close()


def _is_quiet(job: socket.socket) -> bool:
    """Whether an idle copy still runs: if it had ended, a notice or the end of the stream could be read."""
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
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    command = [sys.executable, "-P", "-m", module]  # -P: no module is imported from the current folder
    with other:  # in a session of its own, so that Ctrl-C in a terminal does not reach the worker
        process = subprocess.Popen(
            command,
            stdin=other.fileno(),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=kept | {"PYTHONPATH": os.pathsep.join(path)},
        )
    return control, process


def _end(control: socket.socket, process: subprocess.Popen) -> None:
    control.close()  # the worker ends when its control socket is closed
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
