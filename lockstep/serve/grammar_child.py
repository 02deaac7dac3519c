"""The process in which grammars are compiled first: `python -m lockstep.serve.grammar_child SOCKET`.

It compiles nothing itself: for each grammar there is a copy of it, with limits of its own on time and memory, that says
what the grammar cost. So no grammar takes anything from another one, and all that is needed is there already.
See grammar_proofs.py for the other side.
"""
import contextlib
import gc
import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import threading
import time

from lockstep.serve.matchers import STACK_BYTES, Vocabulary, check, new_matcher, new_reader

LENGTH = struct.Struct("<I")
NUM_READY = 2  # copies that wait for an order
OVERHEAD_BYTES = 128 << 20  # of addresses that a thread and its allocator take before they use them


def main(descriptor: int) -> None:
    """Hands out copies of itself, each as a socket that takes one order, until the socket that they go over is closed.

    A byte that comes over it asks for one more: a few are there before they are needed.
    """
    control = socket.socket(fileno=descriptor)
    reader, running = _reader(json.loads(receive(control))), {}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.disable()  # a copy shares the memory that it does not write to
    wakes, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ready = selectors.DefaultSelector()
    ready.register(control, selectors.EVENT_READ)
    ready.register(wakes, selectors.EVENT_READ)
    for _ in range(NUM_READY):
        _add_copy(control, reader, running)
    while True:
        for key, _ in ready.select():
            if key.fileobj is wakes:
                wakes.recv(4096)
                _bury(running)
            elif _is_asked(control):
                _add_copy(control, reader, running)
            else:
                return


def _is_asked(control: socket.socket) -> bool:
    """Whether one more copy is asked for; False where the other side has ended."""
    try:
        return bool(control.recv(1))
    except ConnectionError:  # it left sockets that it never took
        return False


def _bury(running: dict[int, socket.socket]) -> None:
    """Tells of every copy that has ended how it did, where it could not say so itself."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as job, contextlib.suppress(OSError):
            job.sendall(json.dumps({"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}).encode() + b"\n")


def _add_copy(control: socket.socket, reader, running: dict[int, socket.socket]) -> None:
    """Starts a copy of this process and sends the socket that it takes its order from."""
    own, other = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        control.close()
        other.close()
        _serve(own, reader)
    running[pid] = own
    with other:
        socket.send_fds(control, [b"c"], [other.fileno()])


def _serve(job: socket.socket, reader) -> None:
    """Carries out one order and ends the process."""
    try:
        signal.set_wakeup_fd(-1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the library says as it fails, or we where nobody asks
        order = json.loads(receive(job))
        job.sendall(json.dumps(_cost(reader, **order)).encode() + b"\n")
    finally:
        os._exit(0)


def _cost(reader, grammar: str, seconds: float, num_bytes: int) -> dict[str, object]:
    """What a grammar and its first mask cost, or what is wrong with it. Where it costs too much the process ends."""
    made: dict[str, object] = {}

    def compile_it():
        try:
            matcher = new_matcher(reader, grammar)
            matcher.compute_bitmask()
            check(matcher)
            made["matcher"] = matcher
        except ValueError as error:
            made["error"] = str(error)

    threading.stack_size(STACK_BYTES)
    _limit(seconds, num_bytes)
    before, began = _peak_bytes(), time.process_time()
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    if "matcher" not in made and "error" not in made:
        return {"error": "grammar: it cannot be compiled"}
    return {"error": made.get("error"), "seconds": time.process_time() - began, "num_bytes": _peak_bytes() - before}


def _limit(seconds, num_bytes):
    signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process: a limit of the processor has whole seconds only
    whole = int(seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))
    with contextlib.suppress(FileNotFoundError, ValueError, OSError):  # only Linux counts, and holds to it
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        most = used + STACK_BYTES + OVERHEAD_BYTES + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reader(given):
    """A vocabulary with all special tokens in their place and single bytes behind them: what a grammar costs hardly
    depends on the rest."""
    size = given["size"]
    tokens = [b""] * size + [bytes([byte]) for byte in range(256)]
    for token, text in given["special"].items():
        tokens[int(token)] = bytes.fromhex(text)
    vocabulary = Vocabulary(tokens, sorted(map(int, given["special"])), given["eos_ids"][0], None,
                            lambda text: [size + byte for byte in text.encode()])
    return new_reader(vocabulary, len(tokens), given["eos_ids"])


def send(connection: socket.socket, text: str) -> None:
    """Sends a text with its length before it."""
    data = text.encode()
    connection.sendall(LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> str:
    """A text that `send` sent, and nothing of what comes after it. OSError if the other side ended before."""
    return _exactly(connection, LENGTH.unpack(_exactly(connection, LENGTH.size))[0]).decode()


def _exactly(connection, count):
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("the other side ended")
        data += piece
    return data


if __name__ == "__main__":
    main(int(sys.argv[1]))
