"""The worker's side of job_process.py: a process that forks a copy of itself for each job.

A copy carries out one order (a job's input) after the other, each under limits on processor time and memory. Jobs that
run at the same time run in different copies, so none can take time or memory from another, and since copies are forked
from a process that has imported and prepared everything, they start in milliseconds.
"""

import contextlib
import gc
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

LENGTH = struct.Struct("<I")
Order = bytes | bytearray
MAX_BYTES = 256 << 20  # of one order or answer
# The last byte of every message. A copy that is killed while it answers has not sent it; a notice has none.
COMPLETE, REFUSAL = b"\xa5", b"\xa6"
NOTICE = 0x7F000000  # NOTICE + signal number, in place of a length, says that the copy was ended by that signal
NUM_READY = 2  # copies that are forked in advance
MAX_KEPT_BYTES = 128 << 20  # a copy whose peak memory is above this ends after its order
OUTSIDE = (0, signal.SIGKILL, signal.SIGTERM)  # signals (0: none) that do not come from a limit of time or memory


class _OtherSideEnded(Exception):
    """The process that started this one has ended, or closed the control socket."""


class Ended(Exception):
    """The copy that was to answer has ended. signal: the number of the signal that ended it, 0 for none."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"ended by signal {signal_number}")
        self.signal = signal_number

    @property
    def took_too_long(self) -> bool:
        """Whether the limit of processor time ended the copy."""
        return self.signal in (signal.SIGPROF, signal.SIGXCPU)


def serve(prepare: Callable[[Order], Callable[[Order], bytes]]) -> None:
    """Runs the worker process until the other side ends. Standard input is the control socket.

    prepare: a function that is called with the first message (JobProcess's `about`) and returns the function that
    answers an order; a ValueError of that function is sent as a refusal. The process sends the job socket of each
    forked copy over the control socket. Each byte that it receives there asks for one more copy; NUM_READY are sent
    unasked.
    """
    _settle()
    control, running = socket.socket(fileno=0), {}
    with contextlib.suppress(_OtherSideEnded):  # the normal end: no traceback
        with _with_other_side():
            about, _ = receive(control)
        answer = prepare(about)
        gc.disable()  # collecting writes to objects, and a forked copy shares only memory that is not written to
        gc.freeze()
        _hand_out(control, answer, running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _hand_out(control: socket.socket, answer: Callable[[Order], bytes], running: dict[int, socket.socket]) -> NoReturn:
    """Forks a copy for each byte on the control socket, until _OtherSideEnded. running: {process id: job socket}."""
    wakes = _wakes()
    ready = selectors.DefaultSelector()
    ready.register(control, selectors.EVENT_READ)
    ready.register(wakes, selectors.EVENT_READ)
    for _ in range(NUM_READY):
        _add_copy(control, answer, running)
    while True:
        for key, _ in ready.select():
            if key.fileobj is wakes:
                wakes.recv(4096)
                _bury(running)
            else:
                with _with_other_side():
                    _exactly(control, 1)  # the byte that asks for one more copy
                _add_copy(control, answer, running)


def _settle() -> None:
    """Resets inherited signal handlers, and ignores signals that end services: the other side ends this process."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for limit_reached in (signal.SIGPROF, signal.SIGXCPU):
        signal.signal(limit_reached, signal.SIG_DFL)
    for sent_to_all in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # to every process, by a service manager
        signal.signal(sent_to_all, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spare = os.open(os.devnull, os.O_WRONLY)
    if spare != 2:  # descriptor 2 was free: it stays /dev/null, so that no socket becomes standard error
        os.close(spare)


def _wakes() -> socket.socket:
    """A socket that becomes readable whenever a copy has ended (by SIGCHLD)."""
    wakes, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return wakes


@contextlib.contextmanager
def _with_other_side() -> Iterator[None]:
    """Turns the errors of a closed connection, such as end of stream, broken pipe or reset, into _OtherSideEnded."""
    try:
        yield
    except ConnectionError as error:
        raise _OtherSideEnded from error


def _bury(running: dict[int, socket.socket]) -> None:
    """Reaps the copies that have ended, and sends a notice, with the signal that ended it, over each one's job socket.

    A reader that waits for an answer gets the notice instead; one that has its answer does not read it.
    """
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as job, contextlib.suppress(OSError):
            job.settimeout(0)
            job.sendall(LENGTH.pack(NOTICE + (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)))


def _add_copy(control: socket.socket, answer: Callable[[Order], bytes], running: dict[int, socket.socket]) -> None:
    """Forks a copy of this process and sends its job socket, over which it takes orders, to the other side."""
    own, other = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _serve_orders(own, answer, [control, other, *running.values()])
    running[pid] = own
    with other, _with_other_side():
        socket.send_fds(control, [b"c"], [other.fileno()])


def _serve_orders(job: socket.socket, answer: Callable[[Order], bytes], inherited: list[socket.socket]) -> NoReturn:
    """The life of a forked copy: carries out orders until no more come. inherited: sockets of the parent to close."""
    try:
        for other in inherited:
            other.close()
        signal.set_wakeup_fd(-1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # standard error: nobody reads a traceback of a copy
        while peak_bytes() <= MAX_KEPT_BYTES:
            order, _ = receive(job)
            try:
                reply, mark = answer(order), COMPLETE
            except ValueError as error:
                reply, mark = str(error).encode("utf-8", "surrogatepass"), REFUSAL
            _unlimit()
            send(job, reply, mark)
            del order, reply
            gc.collect()
    finally:
        os._exit(0)


def limit(seconds: float, num_bytes: int) -> None:
    """Bounds the processor time and the memory that this process may take from now on, beyond what it has used.

    At the limit of time a signal ends the process; at that of memory, allocation fails. Linux enforces the limit of
    memory, macOS does not.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)  # the timer has fractions of a second, RLIMIT_CPU whole seconds only
    _set_limit(resource.RLIMIT_CPU, int(time.process_time() + seconds) + 2)
    with contextlib.suppress(FileNotFoundError, ValueError, OSError):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _set_limit(resource.RLIMIT_AS, used + num_bytes)


def _unlimit() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    _set_limit(resource.RLIMIT_CPU, resource.RLIM_INFINITY)
    with contextlib.suppress(ValueError, OSError):
        _set_limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)


def _set_limit(limited_resource: int, soft: int) -> None:
    """Sets the soft limit of a resource, which may be raised again, up to the hard limit of this process."""
    hard = resource.getrlimit(limited_resource)[1]
    finite = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(limited_resource, (min(finite, default=resource.RLIM_INFINITY), hard))


def peak_bytes() -> int:
    """The peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def send(connection: socket.socket, data: bytes, mark: bytes = COMPLETE) -> None:
    """Sends an order or an answer. ValueError if it is too large."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes, at most {MAX_BYTES} can be sent to another process")
    connection.sendall(LENGTH.pack(len(data)))
    connection.sendall(data)
    connection.sendall(mark)


def receive(connection: socket.socket) -> tuple[bytearray, bytes]:
    """One message of `send`: its data and its mark.

    Ended if a notice comes instead, that the copy has ended; ConnectionError if the connection ends before the message.
    """
    length = LENGTH.unpack(_exactly(connection, LENGTH.size))[0]
    if length >= NOTICE:
        raise Ended(length - NOTICE)
    if length > MAX_BYTES:
        raise ConnectionError(f"{length} bytes were announced")
    data, mark = _exactly(connection, length), _exactly(connection, 1)
    if mark not in (COMPLETE, REFUSAL):
        raise ConnectionError("the other side ended while it answered")
    return data, mark


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(min(count - len(data), 1 << 18))
        if not piece:
            raise ConnectionError("the other side ended")
        data += piece
    return data
