"""`python -m tests.receipts.speed`: what receipts cost, on a model of random weights in a published shape.

    python -m tests.receipts.speed [--shape qwen3-0.6b] [--weights q8_0] [--parts serve,verify] [--rounds 7]

serve: 8 and 32 requests with receipts against the same without, in turns: the ratio of the seconds. verify: a replay
of an answer of 512 + 256 and of 128 + 1024 tokens, greedy and sampled, against a plain prefill of the same tokens, in
turns, and against generating the answer alone; and how much memory verification took.
"""

import argparse
import contextlib
import os
import resource
import statistics
import time
from unittest import mock

import numpy as np

from bench.bench_versions import random_model
from lockstep.engine.embedding import Pool
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.leaves import Leaves
from lockstep.engine.request import SamplingParams
from lockstep.receipts.head_blocks import HeadBlocks
from tests.receipts.replays import answers, replay, replayed, run

ANSWERS = ((512, 256), (128, 1024))
SAMPLED = dict(temperature=0.8, top_p=0.95, seed=7)
PROMPT, TOKENS = 64, 64  # of each served request


def draw(model, size, seed):
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, size).tolist()


def timed(function, *args):
    """(Seconds that a call took, what it returned)."""
    began = time.perf_counter()
    made = function(*args)
    return time.perf_counter() - began, made


def in_turns(rounds, *functions):
    """The seconds of each function in each round, [functions][rounds], after one round to warm up."""
    taken = [[timed(function)[0] for function in functions] for _ in range(rounds + 1)]
    return list(zip(*taken[1:], strict=True))


def ratios(first, second):
    """The median of the rounds' ratios, and the lowest and highest of them."""
    each = sorted(a / b for a, b in zip(first, second, strict=True))
    return f"{statistics.median(each):.3f} ({each[0]:.3f}..{each[-1]:.3f})"


def serve(model, rounds):
    """Prints what receipts cost while answers are made."""
    for num_requests in (8, 32):
        options = EngineOptions(max_requests=num_requests, prefix_cache=False)
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **SAMPLED)
        with contextlib.closing(Engine(model, options)) as engine:

            def made(receipt, engine=engine, num_requests=num_requests, params=params):
                for number in range(num_requests):
                    engine.queue(*engine.make(draw(model, PROMPT, number), params, receipt=receipt))
                run(engine)

            with_receipts, without = in_turns(rounds, lambda: made(True), lambda: made(False))
            with timed_leaves() as taken:
                whole = timed(made, True)[0]
            per_token = statistics.median(without) / (num_requests * TOKENS)
            ratio, share = ratios(with_receipts, without), 100 * sum(taken) / whole
            print(f"serve {num_requests}: with / without {ratio}, {1e3 * per_token:.3f} ms/token; leaves {share:.2f} %")


@contextlib.contextmanager
def timed_leaves():
    """A context with a list of the seconds that each call of `Leaves.take` takes: what Python adds to a step."""
    take, taken = Leaves.take, []

    def measured(*args):
        taken.append(timed(take, *args)[0])

    with mock.patch.object(Leaves, "take", measured):
        yield taken


def verify(model, rounds):
    """Prints how fast answers are verified."""
    with contextlib.closing(Engine(model, EngineOptions(max_requests=4, prefix_cache=False))) as engine:
        for (num_prompt, num_output), choice in ((a, c) for a in ANSWERS for c in ({}, SAMPLED)):
            params = SamplingParams(max_tokens=num_output, ignore_eos=True, **choice)
            alone, [[request]] = timed(answers, engine, [draw(model, num_prompt, 3)], [params])
            before, began = rss(), time.perf_counter()
            head, of = HeadBlocks(model, engine.runner), replayed(engine, request, params)
            first = time.perf_counter() - began

            def check(engine=engine, head=head, of=of, request=request):
                found = replay(engine, head, of)
                assert found.mismatch is None and found.answer == request.leaves.answer

            def prefill(engine=engine, of=of):
                engine.queue(engine.make_reading(list(of.token_ids), Pool("last", len(of.token_ids))))
                run(engine)

            checked, plain = in_turns(rounds, check, prefill)
            print(
                f"verify {num_prompt} + {num_output} {'sampled' if choice else 'greedy'}: / prefill "
                f"{ratios(checked, plain)}, alone / verify {alone / statistics.median(checked):.1f} ({alone:.1f} s), "
                f"+{(rss() - before) / 1e6:.0f} MB, first {first:.2f} s"
            )


def rss():
    """The most memory that the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    """Runs the parts that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--weights", default="q8_0")
    parser.add_argument("--parts", default="serve,verify")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model = random_model(args.shape, args.weights)
    vars(model)["can_generate"] = True  # it has no checkpoint that could tell
    print(f"{args.shape} {args.weights}, {len(os.sched_getaffinity(0))} cores")
    for part in args.parts.split(","):
        {"serve": serve, "verify": verify}[part](model, args.rounds)


if __name__ == "__main__":
    main()
