"""Texts for train_mtp.py: what a model itself writes after pieces of the training text, greedy and sampled.

Runs in lockstep's own environment (no torch). Rows are a prompt and its answer, of one length; in every second row the
answer is greedy, in the others sampled at a temperature of 0.4 to 1.
"""

import argparse
from pathlib import Path

import numpy as np

from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM

# of a hundred prompts; nothing of what prepare.py held out
SHARES = {"train.npy": 50, "documents.npy": 12, "packages.npy": 23, "train_pairs.npz": 15}
ROWS_AT_ONCE = 256


def texts(data):
    """The encoded training texts, in the order of SHARES."""
    loaded = [np.load(data / name) for name in SHARES]
    return [text["ids"] if isinstance(text, np.lib.npyio.NpzFile) else text for text in loaded]


def prompts_of(sources, count, length, draw):
    """Pieces of the sources from random places."""
    chosen = draw.choice(len(sources), count, p=np.array(list(SHARES.values())) / 100)
    starts = [draw.integers(len(sources[i]) - length) for i in chosen]
    return [sources[i][s : s + length].tolist() for i, s in zip(chosen, starts, strict=True)]


def params_of(count, length, draw):
    temperatures = np.where(np.arange(count) % 2, draw.uniform(0.4, 1.0, count), 0.0)
    seeds = draw.integers(2**31, size=count)
    return [
        SamplingParams(max_tokens=length, temperature=float(t), seed=int(seed), ignore_eos=True)
        for t, seed in zip(temperatures, seeds, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="the folder of prepare.py and tokenizer.py")
    parser.add_argument("--out", type=Path, required=True, help="a .npz file, written again after every 256 rows")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=192, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # one thread: two would wait for each other on a machine that does other work as well
    llm, draw, rows = LLM(options.model, threads=1, max_requests=32), np.random.default_rng(options.seed), []
    sources = texts(options.data)
    while len(rows) < options.rows:
        prompts = prompts_of(sources, ROWS_AT_ONCE, options.prompt, draw)
        made = llm.generate(prompts, params_of(ROWS_AT_ONCE, options.answer, draw))
        rows += [prompt + list(answer.token_ids) for prompt, answer in zip(prompts, made, strict=True)]
        # written beside and renamed, so that it can be read while more is made
        new = options.out.with_suffix(".new.npz")
        np.savez(new, ids=np.array(rows, np.uint16), prompt=options.prompt)
        new.replace(options.out)
        print(len(rows), flush=True)


if __name__ == "__main__":
    main()
