"""What grammars cost to compile, found out in a process that can be ended."""

import hashlib
import json
import threading
from collections import OrderedDict
from typing import NamedTuple

from lockstep.text.job_process import JobProcess
from lockstep.text.job_server import Ended

MAX_KNOWN = 4096  # grammars whose costs are remembered


class TooSlow(ValueError):
    """A grammar that takes too much time or memory, which is not to be tried again in parts."""


class Cost(NamedTuple):
    """What it took to compile a grammar once."""

    seconds: float
    num_bytes: int


class Proofs:
    """Compiles grammars in another process, which is started with the first and ends with this object.

    size: of the vocabulary; special: {token id: bytes} of the tokens that a grammar may name. jobs: the process. Any
    thread may use it.
    """

    def __init__(self, size: int, special: dict[int, bytes], eos_ids: list[int]) -> None:
        shown = {token: text.hex() for token, text in special.items()}
        about = json.dumps({"size": size, "special": shown, "eos_ids": eos_ids})
        self.jobs = JobProcess("lockstep.text.grammars.child", "grammars", about.encode())
        self._known: OrderedDict[bytes, Cost | str] = OrderedDict()
        self._lock = threading.Lock()

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
            with self._lock:
                self._known[name] = found
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        if isinstance(found, str):
            raise ValueError(found)
        return found if found.seconds <= seconds and found.num_bytes <= num_bytes else None

    def _found_out(self, grammar, seconds, num_bytes):
        """A Cost, what is wrong with the grammar, or None if it takes too much."""
        order = json.dumps({"grammar": grammar, "seconds": seconds, "num_bytes": num_bytes})
        try:
            return Cost(**json.loads(self.jobs.ask(order.encode())))
        except ValueError as error:
            return str(error)
        except Ended as ended:
            if ended.took_too_long:
                return None
            raise TooSlow("grammar: it takes too much memory, or refers to itself too deeply") from None
