"""How much longer a prompt takes where the MTP head reads it: prefill with `--speculate mtp` against without, in turns.

    python bench/bench_mtp_prefill.py MODEL [--weights q8_0] [--prompts 128,500,1000] [--rounds 5]

One thread, measured in processor time, so that other processes matter little. Printed are the ratios and their median.
"""

import argparse
import statistics
import time

import numpy as np

from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM


def seconds(llm, ids):
    """Processor seconds until the first token is there and the head has read the prompt's hidden states."""
    request, began = llm.engine.add(ids, SamplingParams(max_tokens=2, ignore_eos=True)), time.thread_time()
    while not request.output_ids:
        llm.engine.step()
    if llm.engine.drafter:
        llm.engine.drafter.head.guess([(request, 0)], 1)
    taken = time.thread_time() - began
    while llm.engine.has_work:
        llm.engine.step()
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", default="q8_0")
    parser.add_argument("--prompts", default="128,500,1000")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    options = dict(weights=args.weights, threads=1, max_context=2048, max_requests=4, prefix_cache=False)
    plain, mtp, rng = (
        LLM(args.model, **options),
        LLM(args.model, speculate="mtp", draft=1, **options),
        np.random.default_rng(0),
    )
    for length in map(int, args.prompts.split(",")):
        ratios = []
        for _ in range(args.rounds + 1):  # the first warms up
            ids = rng.integers(0, plain.vocab_size, length).tolist()
            without = seconds(plain, ids)
            ratios.append(seconds(mtp, ids) / without)
        print(length, f"{statistics.median(ratios[1:]):.3f}", [f"{ratio:.3f}" for ratio in ratios[1:]], flush=True)


if __name__ == "__main__":
    main()
