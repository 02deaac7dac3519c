"""How much longer a prompt takes where the MTP head reads it: prefill with `--speculate mtp` against without, in turns.

    python bench/bench_mtp_prefill.py MODEL [--weights q8_0] [--prompts 128,500,1000] [--rounds 5]

One thread, measured in processor time, so that other processes matter little. Printed are the ratios and their median.
"""

import statistics
import time

import numpy as np
from options import Parser, several, whole_number

from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM

CONTEXT = 2048  # tokens of a prompt, and the two after it


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
    parser = Parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", default="q8_0")
    parser.add_argument("--prompts", type=several(whole_number(1, CONTEXT - 2)), default="128,500,1000")
    parser.add_counts(rounds=5)
    args = parser.parse_args()
    options = dict(weights=args.weights, threads=1, max_context=CONTEXT, max_requests=4, prefix_cache=False)
    with parser.refusing():
        plain, mtp = LLM(args.model, **options), LLM(args.model, speculate="mtp", draft=1, **options)
    if max(args.prompts) + 2 > plain.max_context:
        parser.error(f"--prompts: expected at most {plain.max_context - 2} for this model, got {max(args.prompts)}")
    rng = np.random.default_rng(0)
    for length in args.prompts:
        ratios = []
        for _ in range(args.rounds + 1):  # the first warms up
            ids = rng.integers(0, plain.vocab_size, length).tolist()
            without = seconds(plain, ids)
            ratios.append(seconds(mtp, ids) / without)
        print(length, f"{statistics.median(ratios[1:]):.3f}", [f"{ratio:.3f}" for ratio in ratios[1:]], flush=True)


if __name__ == "__main__":
    main()
