"""`python -m tests.replicas.routing --replicas 4`: how much of what one large engine finds in its prefix cache several
replicas find together, with this router and with a random one, and how evenly they are loaded."""

import argparse
import random
import sys
import time

import numpy as np

from lockstep import LLM, SamplingParams
from lockstep.engine.async_engine import AsyncEngine, StreamEngine
from lockstep.replicas import fleet
from lockstep.replicas.front import FrontModel

PREFIXES, SUFFIXES, TOKENS, TAIL, UNSHARED = 16, 20, 512, 40, 0.3
OPEN = 24  # requests at once
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def prompts(seed: int, vocab_size: int) -> list[list[int]]:
    """PREFIXES times SUFFIXES prompts that share prefixes, and as many others that UNSHARED of all share nothing."""
    rng = np.random.default_rng(seed)
    new = lambda count: rng.integers(5, vocab_size, count).tolist()
    made = [prefix + new(TAIL) for prefix in [new(TOKENS) for _ in range(PREFIXES)] for _ in range(SUFFIXES)]
    made += [new(TOKENS + TAIL) for _ in range(round(len(made) * UNSHARED / (1 - UNSHARED)))]
    random.Random(seed).shuffle(made)
    return made


def run(engine: StreamEngine, all_prompts: list[list[int]]) -> tuple[int, list[list[int]]]:
    """Answers all prompts, OPEN at once; returns the prompt tokens that were found, and of each moment at which one was
    submitted how many streams each replica had."""
    running, found, queues = [], 0, []
    for prompt in [*all_prompts, *[None] * OPEN]:
        while len(running) >= OPEN or (prompt is None and running):
            left = [stream for stream in running if stream.finish_reason is None]
            found += sum(stream.request.num_cached for stream in running if stream.finish_reason is not None)
            running = left
            time.sleep(0.001)
        if prompt is not None:
            running.append(engine.submit(prompt, PARAMS))
            queues.append([report.num_streams for report in engine.replica_reports()])
    return found, queues


def main() -> int:
    """Prints the figures; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.replicas.routing", description=__doc__)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    sizes = dict(max_requests=8, progress=False)
    kv_tokens = 8 * 4096
    with LLM(threads=1, kv_tokens=kv_tokens * given.replicas, **sizes) as llm:
        asked = prompts(given.seed, llm.vocab_size)
        whole, _ = run(AsyncEngine(llm.engine), asked)
    shared = PREFIXES * (SUFFIXES - 1) * TOKENS
    print(f"{len(asked)} prompts; one engine finds {whole} tokens of {shared} that can be found")
    missed = False
    for name, choose in (("by blocks", fleet.choose), ("at random", lambda links, *_: random.choice(links))):
        fleet.choose = choose
        with FrontModel(num_replicas=given.replicas, kv_tokens=kv_tokens, **sizes) as front:
            found, queues = run(front.fleet, asked)
        full = [each for each in queues if sum(each) >= OPEN - 1]
        longest = float(np.mean([max(each) / (sum(each) / len(each)) for each in full]))
        print(f"{name}: {found / whole:.3f} of these; longest queue {longest:.2f} of the mean (worst "
              f"{max(max(each) / (sum(each) / len(each)) for each in full):.2f})")  # fmt: skip
        missed |= name == "by blocks" and (found < 0.95 * whole or longest > 1.5)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
