"""The cost of compiling a grammar, measured in a worker process that can be killed, before it is compiled here."""

import hashlib
import json
import threading
from collections import OrderedDict
from typing import NamedTuple

from lockstep.text.job_process import JobProcess
from lockstep.text.job_server import Ended

MAX_KNOWN = 4096  # grammars whose costs are cached


class TooSlow(ValueError):
    """A grammar takes too much time or memory. The caller must not try again with parts of it."""


class Cost(NamedTuple):
    """The processor time and memory that compiling a grammar once takes."""

    seconds: float
    num_bytes: int

    def fits(self, num_times: int, seconds: float, num_bytes: int) -> bool:
        """Whether compiling the grammar this many times takes no more than so much processor time and memory."""
        return self.seconds * num_times <= seconds and self.num_bytes * num_times <= num_bytes


class CompileCosts:
    """Measures grammars in a worker process, `jobs`, which starts with the first one and ends with this object.

    size: of the vocabulary. special: {token id: bytes} of the special tokens, which a grammar may name. Any thread may
    use this object.
    """

    def __init__(self, size: int, special: dict[int, bytes], eos_ids: list[int]) -> None:
        shown = {token: text.hex() for token, text in special.items()}
        about = json.dumps({"size": size, "special": shown, "eos_ids": eos_ids})
        self.jobs = JobProcess("lockstep.text.grammars.child", "grammars", about.encode())
        self._known: OrderedDict[bytes, Cost | str] = OrderedDict()
        self._lock = threading.Lock()

    def cost(self, grammar: str, seconds: float, num_bytes: int) -> Cost | None:
        """The Cost of a grammar; None if it is more than `seconds` of processor time or `num_bytes` of memory.

        ValueError, with the reason, for a grammar that is wrong; TooSlow for one that fills the worker's memory.
        """
        name = hashlib.sha256(grammar.encode()).digest()
        with self._lock:
            result = self._known.get(name)
            if result is not None:
                self._known.move_to_end(name)
        if result is None:
            result = self._measured(grammar, seconds, num_bytes)
            if result is None:
                return None
            with self._lock:
                self._known[name] = result
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        if isinstance(result, str):
            raise ValueError(result)
        return result if result.fits(1, seconds, num_bytes) else None

    def _measured(self, grammar, seconds, num_bytes):
        """The grammar's Cost, the message of an error in it, or None if compiling takes more than `seconds`."""
        order = json.dumps({"grammar": grammar, "seconds": seconds, "num_bytes": num_bytes})
        try:
            return Cost(**json.loads(self.jobs.ask(order.encode())))
        except ValueError as error:
            return str(error)
        except Ended as ended:
            if ended.took_too_long:
                return None
            raise TooSlow("grammar: it takes too much memory, or refers to itself too deeply") from None
