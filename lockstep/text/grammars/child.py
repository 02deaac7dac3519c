"""The process in which grammars are compiled first: see job_server.py, and grammar_proofs.py for the other side."""

import json
import threading
import time
from collections.abc import Callable

from lockstep.text.grammars.matchers import STACK_BYTES, Vocabulary, check, new_matcher, new_reader
from lockstep.text.job_server import Order, limit, peak_bytes, serve

OVERHEAD_BYTES = 128 << 20  # of addresses that a thread and its allocator take before they use them


def prepare(about: Order) -> Callable[[Order], bytes]:
    """What compiles a grammar for the vocabulary that the other side tells about, and says what that cost."""
    reader = _reader(json.loads(about))
    return lambda order: json.dumps(_cost(reader, **json.loads(order))).encode()


def _cost(reader, grammar: str, seconds: float, num_bytes: int) -> dict[str, float]:
    """What a grammar and its first mask cost. ValueError for one that is wrong; too costly ones end the process."""
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
    limit(seconds, STACK_BYTES + OVERHEAD_BYTES + num_bytes)
    before, began = peak_bytes(), time.process_time()
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    if "matcher" not in made:
        raise ValueError(made.get("error", "grammar: it cannot be compiled"))
    return {"seconds": time.process_time() - began, "num_bytes": peak_bytes() - before}


def _reader(given):
    """A vocabulary with all special tokens in their place and single bytes behind them: what a grammar costs hardly
    depends on the rest."""
    size = given["size"]
    tokens = [b""] * size + [bytes([byte]) for byte in range(256)]
    for token, text in given["special"].items():
        tokens[int(token)] = bytes.fromhex(text)
    special, eos_ids = sorted(map(int, given["special"])), given["eos_ids"]
    vocabulary = Vocabulary(tokens, special, eos_ids[0], None, lambda text: [size + byte for byte in text.encode()])
    return new_reader(vocabulary, len(tokens), eos_ids)


if __name__ == "__main__":
    serve(prepare)
