"""Jobs in a process that may be ended: the side of that process. The other one is job_process.py.

It does no job itself: for each there is a copy of it, with limits of its own on time and memory, that takes one order
and answers it. So no job takes anything from another one, and all that is needed is there already.
"""
import contextlib
import gc
import os
import resource
import selectors
import signal
import socket
import struct
from collections.abc import Callable

LENGTH = struct.Struct("<I")
MAX_BYTES = 256 << 20  # of one order or answer
COMPLETE = b"\xa5"  # ends what is sent: a copy that was ended while it answered has not sent it, and a notice has none
NOTICE = 0x7F000000  # instead of a length: the copy has ended, with the signal that is added to it
NUM_READY = 2  # copies that wait for an order
OUTSIDE = (0, signal.SIGKILL, signal.SIGTERM)  # how a copy ends that did not reach its limits


class Ended(Exception):
    """The copy that was to answer was ended, by a signal; 0 for none."""

    def __init__(self, signal_number: int):
        super().__init__(f"ended by signal {signal_number}")
        self.signal = signal_number

    @property
    def took_too_long(self) -> bool:
        """Whether it was the limit of time that ended it."""
        return self.signal in (signal.SIGPROF, signal.SIGXCPU)


def serve(prepare: Callable[[bytes], Callable[[bytes], bytes]]) -> None:
    """Hands out copies of this process, over the socket that is its standard input, until the other side ends.

    prepare is given what comes first and returns what makes the answer of an order. Each copy is sent as a socket. A
    byte that comes asks for one more: a few are there before they are needed.
    """
    _settle()
    control = socket.socket(fileno=0)
    answer, running = prepare(receive(control)), {}
    gc.disable()  # a copy shares the memory that it does not write to
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
            elif _is_asked(control):
                _add_copy(control, answer, running)
            else:
                os._exit(0)


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


def _is_asked(control: socket.socket) -> bool:
    """Whether one more copy is asked for; False where the other side has ended."""
    try:
        return bool(control.recv(1))
    except ConnectionError:  # it left sockets that it never took
        return False


def _bury(running: dict[int, socket.socket]) -> None:
    """Tells of every copy that has ended how it did: who has read an answer reads no further."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as job, contextlib.suppress(OSError):
            job.settimeout(0)
            job.sendall(LENGTH.pack(NOTICE + (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)))


def _add_copy(control: socket.socket, answer: Callable[[bytes], bytes], running: dict[int, socket.socket]) -> None:
    """Starts a copy of this process and sends the socket that it takes its order from."""
    own, other = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        for theirs in (control, other, *running.values()):
            theirs.close()
        _serve_one(own, answer)
    running[pid] = own
    with other:
        socket.send_fds(control, [b"c"], [other.fileno()])


def _serve_one(job: socket.socket, answer: Callable[[bytes], bytes]) -> None:
    """Carries out one order and ends the process."""
    try:
        signal.set_wakeup_fd(-1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library says as it fails, or we where nobody asks
        send(job, answer(receive(job)))
    finally:
        os._exit(0)


def limit(seconds: float, num_bytes: int) -> None:
    """Bounds what this process may take from now on: time of the processor, which ends it, and memory.

    Memory is bounded where the system holds to it, which Linux does and macOS does not.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process: a limit of the processor has whole seconds only
    whole = int(seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))
    with contextlib.suppress(FileNotFoundError, ValueError, OSError):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, used + num_bytes))


def send(connection: socket.socket, data: bytes) -> None:
    """Sends an order or an answer. ValueError if it is too large."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes, at most {MAX_BYTES} can be sent to another process")
    connection.sendall(LENGTH.pack(len(data)))
    connection.sendall(data)
    connection.sendall(COMPLETE)


def receive(connection: socket.socket) -> bytearray:
    """What `send` sent, and nothing of what comes after it.

    Ended if the copy that was to send it has ended; ConnectionError if the other side went away.
    """
    length = LENGTH.unpack(_exactly(connection, LENGTH.size))[0]
    if length >= NOTICE:
        raise Ended(length - NOTICE)
    if length > MAX_BYTES:
        raise ConnectionError(f"{length} bytes were announced")
    data = _exactly(connection, length)
    if _exactly(connection, 1) != COMPLETE:
        raise ConnectionError("the other side ended while it answered")
    return data


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(min(count - len(data), 1 << 18))
        if not piece:
            raise ConnectionError("the other side ended")
        data += piece
    return data
