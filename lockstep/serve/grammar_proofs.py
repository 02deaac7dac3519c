"""What grammars cost to compile, found out in a process that can be ended."""
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from typing import NamedTuple

from lockstep.serve.grammar_child import send

MAX_KNOWN = 4096  # grammars whose costs are remembered
WAIT_SECONDS = 15.0  # for a process that is kept from working
GONE = "the process that compiles grammars ended"


class TooSlow(ValueError):
    """A grammar that takes too much time or memory, which is not to be tried again in parts."""


class Busy(Exception):
    """Too much else is being compiled: the same grammar may be compiled later."""


class Cost(NamedTuple):
    """What it took to compile a grammar once."""

    seconds: float
    num_bytes: int


class Proofs:
    """Compiles grammars in another process, which is started with the first and ends with this object.

    size: of the vocabulary; special: {token id: bytes} of the tokens that a grammar may name. Any thread may use it.
    """

    def __init__(self, size: int, special: dict[int, bytes], eos_ids: list[int]):
        shown = {token: text.hex() for token, text in special.items()}
        self._about = json.dumps({"size": size, "special": shown, "eos_ids": eos_ids})
        self._known: OrderedDict[bytes, Cost | str] = OrderedDict()
        self._lock, self._control, self._end = threading.Lock(), None, None
        self.process_id: int | None = None

    def cost(self, grammar: str, seconds: float, num_bytes: int) -> Cost | None:
        """The Cost of a grammar; None if it is more than so much processor time or memory.

        ValueError, with the reason, for a grammar that is wrong.
        """
        name = hashlib.sha256(grammar.encode()).digest()
        with self._lock:
            found = self._known.get(name)
            if found is not None:
                self._known.move_to_end(name)
        if found is None:
            found = self._found_out(grammar, seconds, num_bytes)
            if found is None:
                return None
            self._remember(name, found)
        if isinstance(found, str):
            raise ValueError(found)
        return found if found.seconds <= seconds and found.num_bytes <= num_bytes else None

    def _remember(self, name, found):
        with self._lock:
            self._known[name] = found
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def _found_out(self, grammar, seconds, num_bytes):
        """A Cost, what is wrong with the grammar, or None if it takes too much."""
        order = json.dumps({"grammar": grammar, "seconds": seconds, "num_bytes": num_bytes})
        for is_last in (False, True):
            answer = self._ask(order)
            if answer is not None and answer.get("signal") not in (0, signal.SIGKILL, signal.SIGTERM):
                break  # else somebody ended it from outside
            if is_last:
                raise RuntimeError(GONE)
        if "signal" not in answer:
            return answer["error"] or Cost(answer["seconds"], answer["num_bytes"])
        if answer["signal"] in (signal.SIGPROF, signal.SIGXCPU):
            return None
        raise TooSlow("grammar: it takes too much memory, or refers to itself too deeply")

    def _ask(self, order):
        """The answer to an order; None if the process has gone. Busy where it gives none in time."""
        try:
            with self._copy() as job:
                job.settimeout(WAIT_SECONDS)
                send(job, order)
                line = job.makefile("rb").readline()
        except TimeoutError:
            raise Busy(f"a grammar was not compiled in {WAIT_SECONDS:g} s") from None
        except OSError:
            line = b""
        if not line:
            self.close()
        return json.loads(line) if line else None

    def _copy(self):
        """A socket to a process that takes one order. OSError if there is none any more."""
        with self._lock:
            if self._control is None:
                self._start()
            _, descriptors, *_ = socket.recv_fds(self._control, 1, 1)
            if not descriptors:
                raise ConnectionError(GONE)
            job = socket.socket(fileno=descriptors[0])
            self._control.sendall(b"c")  # for the next
            return job

    def warm(self) -> None:
        """Starts the process, so that the first grammar does not wait for it."""
        with self._lock:
            if self._control is None:
                self._start()

    def _start(self):
        self._control, other = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "lockstep.serve.grammar_child", str(other.fileno())]
        with other:  # in a session of its own: what a terminal sends to this process is not for that one
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment,
                                       pass_fds=[other.fileno()], start_new_session=True)
        self.process_id, self._end = process.pid, weakref.finalize(self, _end, self._control, process)
        send(self._control, self._about)

    def close(self) -> None:
        """Ends the process; the next grammar starts another one."""
        with self._lock:
            if self._control is not None:
                self._end()
            self._control = self._end = None


def _end(control, process):
    control.close()  # which it takes as its end
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
