"""The worker process that compiles untrusted grammars first (see text/job_server.py); compile_costs.py asks it."""

import json
import threading
import time
from collections.abc import Callable

from lockstep.text.grammars.matchers import STACK_BYTES, Vocabulary, check, new_matcher, new_reader
from lockstep.text.job_server import Order, limit, peak_bytes, serve

OVERHEAD_BYTES = 128 << 20  # of address space that a new thread and its allocator reserve


def prepare(about: Order) -> Callable[[Order], bytes]:
    """The function that compiles a grammar and returns the cost, as JSON. about: the vocabulary, as JSON."""
    reader = _reader(json.loads(about))
    return lambda order: json.dumps(_cost(reader, **json.loads(order))).encode()


def _cost(reader, grammar: str, seconds: float, num_bytes: int) -> dict[str, float]:
    """The cost of compiling a grammar and computing its first mask. ValueError for a grammar that is wrong; one that
    takes more than `seconds` or `num_bytes` ends this process."""
    result: dict[str, object] = {}

    def compile_it():
        try:
            matcher = new_matcher(reader, grammar)
            matcher.compute_bitmask()
            check(matcher)
            result["matcher"] = matcher
        except ValueError as error:
            result["error"] = str(error)

    threading.stack_size(STACK_BYTES)
    limit(seconds, STACK_BYTES + OVERHEAD_BYTES + num_bytes)
    before, began = peak_bytes(), time.process_time()
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    if "matcher" not in result:
        raise ValueError(result.get("error", "grammar: it cannot be compiled"))
    return {"seconds": time.process_time() - began, "num_bytes": peak_bytes() - before}


def _reader(given):
    """llguidance's form of a vocabulary that has the special tokens with their ids, empty tokens in place of the rest,
    and single bytes after them: the cost of compiling hardly depends on the ordinary tokens."""
    size = given["size"]
    tokens = [b""] * size + [bytes([byte]) for byte in range(256)]
    for token, text in given["special"].items():
        tokens[int(token)] = bytes.fromhex(text)
    special, eos_ids = sorted(map(int, given["special"])), given["eos_ids"]
    vocabulary = Vocabulary(tokens, special, eos_ids[0], None, lambda text: [size + byte for byte in text.encode()])
    return new_reader(vocabulary, len(tokens), eos_ids)


if __name__ == "__main__":
    serve(prepare)
