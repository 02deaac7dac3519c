"""Jobs in a process that may be ended: the side of that process. The other one is job_process.py.

It does no job itself: copies of it do, each with limits of its own on time and memory, one order after the other. So no
job takes anything from one beside it, and all that is needed is there already.
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
# What is sent ends with one of them: a copy that is ended while it answers has not sent it, and a notice has none.
COMPLETE, REFUSAL = b"\xa5", b"\xa6"
NOTICE = 0x7F000000  # instead of a length: the copy has ended, with the signal that is added to it
NUM_READY = 2  # copies that wait for their first order
MAX_KEPT_BYTES = 128 << 20  # that a copy has used at most: one that needed more is not used again
OUTSIDE = (0, signal.SIGKILL, signal.SIGTERM)  # how a copy ends that did not reach its limits


class _OtherSideEnded(Exception):
    """The process that this one belongs to has ended, or has let go of it."""


class Ended(Exception):
    """The copy that was to answer was ended, by a signal; 0 for none."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"ended by signal {signal_number}")
        self.signal = signal_number

    @property
    def took_too_long(self) -> bool:
        """Whether it was the limit of time that ended it."""
        return self.signal in (signal.SIGPROF, signal.SIGXCPU)


def serve(prepare: Callable[[Order], Callable[[Order], bytes]]) -> None:
    """Hands out copies of this process, over the socket that is its standard input, until the other side ends.

    prepare is given what comes first and returns what makes the answer of an order, or raises ValueError, which then is
    the answer. Each copy is sent as a socket. A byte that comes asks for one more: a few are there before they are
    needed.
    """
    _settle()
    control, running = socket.socket(fileno=0), {}
    with contextlib.suppress(_OtherSideEnded):  # as it may whenever it likes, which is no fault and nobody's to read
        with _with_other_side():
            about, _ = receive(control)
        answer = prepare(about)
        gc.disable()  # a copy shares the memory that it does not write to
        gc.freeze()
        _hand_out(control, answer, running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _hand_out(control: socket.socket, answer: Callable[[Order], bytes], running: dict[int, socket.socket]) -> NoReturn:
    """Starts copies as they are asked for, and keeps `running` up to date, until _OtherSideEnded."""
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
                    _exactly(control, 1)  # the byte that asks for one more
                _add_copy(control, answer, running)


def _settle() -> None:
    """Undoes what was inherited, and leaves it to the other side when this process ends."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for limit_reached in (signal.SIGPROF, signal.SIGXCPU):
        signal.signal(limit_reached, signal.SIG_DFL)
    for for_all in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a service manager sends them to every process
        signal.signal(for_all, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spare = os.open(os.devnull, os.O_WRONLY)
    if spare != 2:  # else there was no standard error, and a socket would have taken its place
        os.close(spare)


def _wakes() -> socket.socket:
    """A socket that can be read whenever a copy has ended."""
    wakes, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return wakes


@contextlib.contextmanager
def _with_other_side() -> Iterator[None]:
    """Turns what a socket says when the other side has ended into _OtherSideEnded.

    Closed sockets say it in several ways: with what they had not read yet left in them, they are "reset".
    """
    try:
        yield
    except ConnectionError as error:
        raise _OtherSideEnded from error


def _bury(running: dict[int, socket.socket]) -> None:
    """Tells of every copy that has ended how it did: who has read an answer reads no further."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as job, contextlib.suppress(OSError):
            job.settimeout(0)
            job.sendall(LENGTH.pack(NOTICE + (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)))


def _add_copy(control: socket.socket, answer: Callable[[Order], bytes], running: dict[int, socket.socket]) -> None:
    """Starts a copy of this process and sends the socket that it takes its orders from."""
    own, other = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _serve_orders(own, answer, [control, other, *running.values()])
    running[pid] = own
    with other, _with_other_side():
        socket.send_fds(control, [b"c"], [other.fileno()])


def _serve_orders(job: socket.socket, answer: Callable[[Order], bytes], not_ours: list[socket.socket]) -> NoReturn:
    """Carries out orders until no more come, and ends the process."""
    try:
        for each in not_ours:
            each.close()
        signal.set_wakeup_fd(-1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library says as it fails, or we where nobody asks
        while peak_bytes() <= MAX_KEPT_BYTES:
            order, _ = receive(job)
            try:
                found, mark = answer(order), COMPLETE
            except ValueError as error:
                found, mark = str(error).encode("utf-8", "surrogatepass"), REFUSAL
            _unlimit()
            send(job, found, mark)
            del order, found
            gc.collect()
    finally:
        os._exit(0)


def limit(seconds: float, num_bytes: int) -> None:
    """Bounds what an order may take from now on: time of the processor, which ends the process, and memory.

    Memory is bounded where the system holds to it, which Linux does and macOS does not.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process: a limit of the processor has whole seconds only
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


def _set_limit(what: int, most: int) -> None:
    """Sets a limit that may be raised again, as far as this process was given."""
    hard = resource.getrlimit(what)[1]
    given = [limit for limit in (most, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(what, (min(given, default=resource.RLIM_INFINITY), hard))


def peak_bytes() -> int:
    """The most memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def send(connection: socket.socket, data: bytes, mark: bytes = COMPLETE) -> None:
    """Sends an order or an answer. ValueError if it is too large."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes, at most {MAX_BYTES} can be sent to another process")
    connection.sendall(LENGTH.pack(len(data)))
    connection.sendall(data)
    connection.sendall(mark)


def receive(connection: socket.socket) -> tuple[bytearray, bytes]:
    """What `send` sent, with its mark, and nothing of what comes after it.

    Ended if the copy that was to send it has ended; ConnectionError if the other side went away.
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
