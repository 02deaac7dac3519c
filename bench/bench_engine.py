"""The time of the engine's thread outside of native steps: what scheduling, batches, tokens, text and readers take.

    python bench/bench_engine.py [MODEL] [--requests 32] [--tokens 64] [--rounds 3] [--cases greedy,logprobs]

The engine runs in its thread, as behind the server, and one reader waits for the ends of all answers. Where a model has
no tokenizer, answers are read with the bundled model's. Each line is one kind of requests: milliseconds of a step that
the thread spends in native code and in each part outside, and the share of all that is outside, by the clock and in CPU
time of the thread. Medians of the rounds, in which the kinds take turns.
"""

import asyncio
import itertools
import time

import numpy as np
from options import Parser, one_of, several

from lockstep import LLM, SamplingParams
from lockstep.engine.async_engine import AsyncEngine, keep_loaded
from lockstep.engine.token_stream import batches, until_the_end
from lockstep.lab.load import StepClock
from lockstep.text.tokenizer.tokenizer import Detokenizer

PROMPT_TOKENS = 16
PARTS = ("schedule", "build", "native", "take", "hand over")
SAMPLED = dict(temperature=0.8, top_p=0.95)
CASES = {
    "greedy": {},
    "sampled": SAMPLED,
    "logprobs": SAMPLED | dict(logprobs=5),
    "stop strings": SAMPLED | dict(stop=("\n\n\n\n", "<end of the answer>")),
    "penalties": SAMPLED | dict(repetition_penalty=1.1, presence_penalty=0.1),
    "come and go": SAMPLED,
}


class Text:
    """A Detokenizer of another model's vocabulary: ids beyond it count from 0 again."""

    def __init__(self, tokenizer):
        self._tokens, self._vocab_size = Detokenizer(tokenizer), tokenizer.vocab_size

    def push(self, token_id):
        return self._tokens.push(token_id % self._vocab_size)

    def finish(self):
        return self._tokens.finish()


class Timed:
    """An engine whose steps a StepClock times."""

    def __init__(self, engine):
        # seconds by the clock and of this thread's CPU time
        self.engine, self.clock = engine, StepClock(engine, lambda: np.array([time.perf_counter(), time.thread_time()]))

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def step(self):
        return self.clock.step()


def requests_of(case, count, num_tokens, vocab_size, number):
    """[(token ids of a prompt, SamplingParams), ...]; prompts differ from round to round."""
    rng, made = np.random.default_rng([number]), []
    for i in range(2 * count if case == "come and go" else count):
        length = int(rng.integers(num_tokens // 2, num_tokens + 1)) if case == "come and go" else num_tokens
        params = SamplingParams(max_tokens=length, ignore_eos=True, seed=i, **CASES[case])
        made.append((rng.integers(0, vocab_size, PROMPT_TOKENS).tolist(), params))
    return made


async def run(engine, requests):
    """Runs requests to their end."""
    streams = engine.submit_all(requests)
    async for _ in batches(streams, until_the_end):
        pass
    assert all(stream.finish_reason == "length" for stream in streams), [s.finish_reason for s in streams]


def parts_of(steps):
    """Seconds of each of PARTS, by the clock and in CPU time [PARTS, 2], of all steps but the first and the last."""
    found = [
        (a.scheduled - a.started, a.entered - a.scheduled, a.left - a.entered, a.ended - a.left, b.started - a.ended)
        for a, b in itertools.pairwise(steps[1:])
    ]
    return np.mean(found, axis=0)


def measure(timed, running, case, args, number):
    """parts_of one run of a kind of requests."""
    vocab_size = timed.engine.model.config.vocab_size
    timed.clock.steps.clear()
    asyncio.run(run(running, requests_of(case, args.requests, args.tokens, vocab_size, number)))
    return parts_of(timed.clock.steps)


def report(case, runs):
    """Prints a line about a kind's runs."""
    parts = np.median(runs, axis=0) * 1e3
    shares = np.median([1 - run[2] / run.sum(axis=0) for run in runs], axis=0)
    shown = "  ".join(f"{name} {ms:7.3f}" for name, ms in zip(PARTS, parts[:, 0], strict=True))
    print(f"{case:13s} {shown}   outside {shares[0]:.2%} of the time, {shares[1]:.2%} of CPU time", flush=True)


def main():
    parser = Parser(__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_counts(requests=32, tokens=64, rounds=3)
    parser.add_argument("--cases", type=several(one_of(CASES)), default=",".join(CASES))
    parser.add_threads(usual=None)
    args = parser.parse_args()
    room = PROMPT_TOKENS + args.tokens
    with parser.refusing():
        llm = LLM(args.model, max_requests=args.requests, max_context=room, threads=args.threads)
    if room > llm.max_context:
        parser.error(f"--tokens {args.tokens}: expected at most {llm.max_context - PROMPT_TOKENS} for this model")
    timed = Timed(llm.engine)
    if not llm.has_tokenizer:
        tokenizer = LLM(max_context=64).tokenizer
        llm.engine.new_detokenizer = lambda request: Text(tokenizer)
    keep_loaded()
    with timed.clock:
        running = AsyncEngine(timed)
        runs = {case: [] for case in args.cases}
        measure(timed, running, args.cases[0], args, 0)
        for number in range(1, args.rounds + 1):
            for case in args.cases:
                runs[case].append(measure(timed, running, case, args, number))
        for case in args.cases:
            report(case, runs[case])
        running.close()


if __name__ == "__main__":
    main()
