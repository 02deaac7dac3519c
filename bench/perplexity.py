"""Perplexity of a text under each type of KV cache, and how far logits move from those of a float32 cache.

    python bench/perplexity.py [MODEL] [--text FILE] [--weights auto] [--window 512] [--threads 2]

The text runs in windows that know nothing of each other. Without --text it is documentation that the bundled model has
not seen: the docstrings of modules of the standard library that its training held out (training/prepare.py).
"""

import argparse
import ast
import importlib.util
import math
import pathlib

import numpy as np

from lockstep.engine.model import load_model
from lockstep.ops.kv_cache import KV_DTYPES
from lockstep.parity import Path, run_path
from lockstep.runtime.executor import WeightStore
from lockstep.serve.hub import resolve_model
from lockstep.serve.tokenizer import load_tokenizer
from lockstep.weights.checkpoint import open_checkpoint

HELD_OUT = ("asyncio.unix_events", "bz2", "email.utils", "getopt", "wave")


def docstrings(module):
    """All docstrings of a module, in the order of its source."""
    source = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes))) + "\n"


def logits_of(model, windows, threads):
    """Logits of all positions of all windows, each window on its own."""
    return np.concatenate(
        [run_path(model, ids, Path("whole", (len(ids),), threads), num_rows=len(ids)).logits for ids in windows]
    )


def nats(logits, targets):
    """Minus the log-probability of each target, in float64."""
    x = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, targets[:, None], -1)[:, 0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    folder = resolve_model(args.model)
    text = args.text.read_text() if args.text else "\n\n".join(map(docstrings, HELD_OUT))
    ids, size = load_tokenizer(folder).encode(text), args.window
    windows = [ids[i : i + size] for i in range(0, len(ids) - size, size)]
    targets = np.array([ids[i + 1 : i + size + 1] for i in range(0, len(ids) - size, size)]).ravel()
    checkpoint, store, exact = open_checkpoint(folder), WeightStore(), None
    print(f"{len(text.encode())} bytes, {targets.size} tokens in windows of {size}, weights {args.weights}")
    for kv_dtype in KV_DTYPES:
        logits = logits_of(load_model(checkpoint, store, args.weights, kv_dtype, size), windows, args.threads)
        exact = logits if exact is None else exact
        lost, moved = nats(logits, targets).mean(), logits - exact
        print(
            f"{kv_dtype:5} {lost:.5f} nats a token, perplexity {math.exp(lost):.4f}; logits differ by rms "
            f"{np.sqrt((moved**2).mean()):.4f}, argmax in {(logits.argmax(-1) != exact.argmax(-1)).mean():.2%}"
        )


if __name__ == "__main__":
    main()
