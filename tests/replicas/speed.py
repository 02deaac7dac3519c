"""`python -m tests.replicas.speed MODEL [--weights q8_0] [--ray]`: what it costs that an engine runs in a process of
its own, or in an actor of Ray: one replica against the same engine in this process, in turns, each with all cores."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from lockstep import LLM, SamplingParams
from lockstep.engine.async_engine import AsyncEngine, StreamEngine
from lockstep.native.host import num_cores
from lockstep.replicas.front import FrontModel

PROMPT, TOKENS, ROUNDS, STREAMS, FIRSTS = 64, 64, 5, (8, 32), 15
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.8, seed=1)


def prompt(vocab_size: int, seed: int) -> list[int]:
    """PROMPT random tokens."""
    return np.random.default_rng(seed).integers(5, vocab_size - 300, PROMPT).tolist()


def answer_all(engine: StreamEngine, num_streams: int, seed: int, vocab_size: int) -> float:
    """Seconds in which so many streams that begin together end."""
    asked = [(prompt(vocab_size, seed * 1000 + i), PARAMS) for i in range(num_streams)]
    began = time.perf_counter()
    for stream in engine.submit_all(asked):
        for _ in stream:
            pass
    return time.perf_counter() - began


def first_token(engine: StreamEngine, seed: int, vocab_size: int) -> float:
    """Seconds until the first token of a stream that is alone."""
    asked, began = prompt(vocab_size, seed), time.perf_counter()
    stream = engine.submit(asked, SamplingParams(max_tokens=1, ignore_eos=True))
    next(stream)
    return time.perf_counter() - began


def in_turns(rounds: int, *functions: Callable[[int], float]) -> list[list[float]]:
    """What each function returns in each round, after one to warm up."""
    found = [[function(round_) for function in functions] for round_ in range(rounds + 1)]
    return [list(each) for each in zip(*found[1:], strict=True)]


def main() -> int:
    """Prints the figures; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.replicas.speed", description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    carrier = None
    if given.ray:
        from lockstep.replicas.ray_carrier import RayCarrier

        carrier = RayCarrier("local")
    sizes = dict(threads=num_cores(), max_requests=32, max_context=1024, kv_tokens=32 * 192, prefix_cache=False)
    missed = False
    with (
        LLM(given.model, weights=given.weights, **sizes) as llm,
        FrontModel(given.model, weights=given.weights, num_replicas=1, carrier=carrier, **sizes) as front,
    ):
        here, there, size = AsyncEngine(llm.engine), front.fleet, llm.vocab_size
        for num_streams in STREAMS:
            direct, replica = in_turns(
                ROUNDS,
                lambda seed, n=num_streams: answer_all(here, n, seed, size),
                lambda seed, n=num_streams: answer_all(there, n, seed, size),
            )
            each = sorted(a / b for a, b in zip(direct, replica, strict=True))
            speed = num_streams * TOKENS / statistics.median(direct)
            print(f"{num_streams} streams: {statistics.median(each):.3f} of direct ({each[0]:.3f}..{each[-1]:.3f}), "
                  f"which gives {speed:.0f} tokens/s", flush=True)  # fmt: skip
            missed |= statistics.median(each) < 0.97
        direct, replica = in_turns(
            FIRSTS, lambda seed: first_token(here, seed, size), lambda seed: first_token(there, seed, size)
        )
        later = 1e3 * statistics.median(b - a for a, b in zip(direct, replica, strict=True))
        print(f"first token: {1e3 * statistics.median(direct):.1f} ms, through the replica {later:+.1f} ms")
        here.close()
    return int(missed or later > 10)


if __name__ == "__main__":
    sys.exit(main())
