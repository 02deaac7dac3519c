"""Attention alone, by model shape and type of cache: prefill against this machine's float32 peak, decode against its
memory, and one token at a time.

    python bench/bench_attention.py [--threads 2] [--rounds 5] [--shape qwen3] [--dtype q8] [--prefill 1000]
                                    [--contexts 1024,8192,32768] [--per-token]

All variants run interleaved in one process; medians of the rounds. A multiply-add counts as two operations; only
visible keys count. GB/s counts every byte of K and V once. Decode runs on the pages of as many layers as do not fit in
any cache, one after the other as in a model.
"""

import argparse
import time

import numpy as np

from lockstep.lab import ceiling
from lockstep.native.kernel import kernel
from lockstep.ops import BACKENDS
from lockstep.ops.attention.attention import Attention
from lockstep.ops.attention.kv_cache import ELEMENTS, KV_DTYPES, PAGE_TOKENS, SCALE_BYTES, page_shapes
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor, aligned
from lockstep.runtime.program import DTYPES, Program
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from tests.ops.harness import Given, ragged_step

SHAPES = {"qwen3": (16, 8, 128), "qwen3_5": (8, 2, 256), "llama": (32, 8, 64), "llama_8b": (32, 8, 128)}  # H, G, K
PAST_CACHES = 192 << 20  # bytes that no cache keeps from one step to the next
SCALE = 0x3CA4  # bfloat16 of 0.02


@kernel
def nothing(op, step, thread, num_threads):
    """Stands for what makes the queries."""


class Case:
    """Attention of `tokens` queries at the end of a context, in `layers` layers with pages of their own."""

    def __init__(self, team, backend, shape, dtype, tokens, context, layers):
        (H, G, K), program = shape, Program()
        pages = [random_pages(shape, context, dtype, part) for _ in range(layers) for part in (0, 1)]
        q, out, stats = (program.tensor(n, "T", w) for n, w in (("q", H * K), ("out", H * K), ("stats", 2 * H)))
        program.emit(Given(out=q))
        for i in range(layers):
            k_pages, v_pages = (
                program.cache(f"{i}{part}", "pages", ELEMENTS[dtype], pages[2 * i + part].shape[1:]) for part in (0, 1)
            )
            program.emit(
                Attention(
                    out=out,
                    stats=stats,
                    q=q,
                    k_pages=k_pages,
                    v_pages=v_pages,
                    num_heads=H,
                    num_kv_heads=G,
                    head_dim=K,
                    scale=K**-0.5,
                    window=0,
                    soft_cap=0.0,
                )
            )
        self._executor = Executor(
            program,
            {**BACKENDS[backend], "given": Implementation(nothing)},
            team,
            WeightStore(),
            {"T": tokens, "R": 1, "S": 1},
            {f"{i // 2}{i % 2}": p.ctypes.data for i, p in enumerate(pages)},
        )
        self._executor.view(q, tokens)[...] = np.random.default_rng(0).standard_normal((tokens, H * K))
        table = np.random.default_rng(2).permutation(len(pages[0]))[None]
        self._step, self._held = ragged_step([tokens], [context], table)
        self._pages, self._layers = pages, layers
        self.num_bytes = 2 * context * pages[0][0].nbytes // PAGE_TOKENS
        self.ops = 4 * H * K * (tokens * context - tokens * (tokens - 1) // 2)

    def seconds(self):
        """Of one layer."""
        started = time.perf_counter()
        self._executor.run(self._step)
        return (time.perf_counter() - started) / self._layers


def random_pages(shape, context, dtype, part):
    """Pages of K (part 0) or V of one request."""
    (_, G, K), kind = shape, DTYPES[ELEMENTS[dtype]]
    cell, rng = page_shapes(G, K, dtype)[part], np.random.default_rng(part)
    size = -(-context // PAGE_TOKENS) * int(np.prod(cell))
    pages = aligned(size * kind.itemsize).view(kind).reshape(-1, *cell)
    if dtype == "q8":
        pages[...] = rng.integers(-127, 128, pages.shape, np.int8)
        pages[..., -SCALE_BYTES * PAGE_TOKENS :].view(np.uint16)[...] = SCALE
    else:
        numbers = rng.standard_normal(pages.shape, np.float32)
        pages[...] = numbers.view(np.uint16).reshape(*pages.shape, 2)[..., 1] if dtype == "bf16" else numbers
    return pages


def cases(args, team):
    """{(shape, dtype, what): Case}"""
    made = {}
    for name in args.shape or ["qwen3"]:
        (_, G, K), many = SHAPES[name], args.prefill
        for dtype in args.dtype or KV_DTYPES:
            if many:
                made[name, dtype, f"prefill {many}"] = Case(team, "cpu", SHAPES[name], dtype, many, many, 1)
            if many and args.per_token:
                made[name, dtype, f"per token {many}"] = Case(team, "per_token", SHAPES[name], dtype, many, many, 1)
            for context in map(int, filter(None, args.contexts.split(","))):
                in_bytes = 2 * context * G * K * {"f32": 4, "bf16": 2, "q8": 1}[dtype]
                layers = max(1, -(-PAST_CACHES // in_bytes))
                made[name, dtype, f"decode {context}"] = Case(team, "cpu", SHAPES[name], dtype, 1, context, layers)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--dtype", choices=KV_DTYPES, action="append")
    parser.add_argument("--prefill", type=int, default=1000, metavar="TOKENS", help="0: none")
    parser.add_argument("--contexts", default="1024,8192,32768", help="of decode")
    parser.add_argument("--per-token", action="store_true")
    args = parser.parse_args()
    team = Team(args.threads)
    made = cases(args, team)
    times, tops = {case: [] for case in made}, []
    for _ in range(args.rounds + 1):
        tops.append(ceiling.measure(team))
        for case in made:
            times[case].append(made[case].seconds())
    f32, memory = (np.median([getattr(t, name) for t in tops]) for name in ("f32_per_second", "bytes_per_second"))
    print(f"{args.threads} threads: float32 {f32 / 1e9:.0f} GFLOP/s, memory {memory / 1e9:.1f} GB/s")
    for case, one in made.items():
        took = np.median(times[case][1:])
        ops, read = one.ops / took, one.num_bytes / took
        print(
            f"{' '.join(case):26} {1e3 * took:9.3f} ms {ops / 1e9:7.1f} GFLOP/s = {100 * ops / f32:3.0f} % of float32"
            f" {read / 1e9:6.1f} GB/s = {100 * read / memory:3.0f} %"
        )
    team.close()


if __name__ == "__main__":
    main()
