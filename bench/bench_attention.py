"""Attention alone, by model shape: prefill against this core's FMA peak, decode against its read speed, batched against
one token at a time.

    python bench/bench_attention.py [--threads 2] [--rounds 5] [--shape qwen3] [--context 1000]

All variants run interleaved in one process; medians of the rounds. A multiply-add counts as two operations; only
visible keys count. GB/s counts every byte of K and V once.
"""
import argparse
import time

import numpy as np

from lockstep.ops import attention_cpu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor, WeightStore, aligned
from lockstep.runtime.kernel import kernel
from lockstep.runtime.machine import stack_memory
from lockstep.runtime.program import CacheArray, Program
from lockstep.runtime.simd import lanes, store
from lockstep.runtime.threads import Team
from lockstep.runtime.tiles import tile_fma_f32, tile_store, tile_zeros
from tests.ops.harness import ragged_step

SHAPES = {"qwen3": (16, 8, 128), "qwen3_5": (8, 2, 256), "llama": (32, 8, 64)}  # H, G, K
CHAINS, ZERO = 1 << 17, np.float32(0)


@kernel
def nothing(op, step, thread, num_threads):
    """Stands for what makes the queries."""


@kernel
def fma_peak(op, step, thread, num_threads):
    """Every thread: a 6 x 1 register tile over operands that stay in the first-level cache."""
    acc, memory = tile_zeros(6, 1), stack_memory(4096)
    for i in range(0, 4096, 64):
        store(memory + i, lanes(ZERO))
    for i in range(CHAINS):
        acc = tile_fma_f32(acc, memory + 4 * (i % 16), 256, memory + 2048, 0)
    tile_store(acc, memory, 256, 1)


def executor(team, implementation, shape, tokens, pages, dtype):
    """Attention on random queries and the given pages."""
    (H, G, K), program = shape, Program()
    q, out, stats = (
        program.tensor("q", "T", H * K),
        program.tensor("out", "T", H * K),
        program.tensor("stats", "T", 2 * H),
    )
    kinds = [CacheArray(n, "pages", dtype, p.shape[1:]) for n, p in zip("kv", pages)]
    program.emit("input", [q], [])
    program.emit("attention", [out, stats], [q, *kinds], num_heads=H, num_kv_heads=G, head_dim=K, sm_scale=K ** -0.5,
                 sliding_window=0, soft_cap=0.0, kv_bf16=int(dtype == "bf16"))
    made = Executor(program, {"input": Implementation(nothing), "attention": implementation}, team, WeightStore(),
                    {"T": tokens, "R": 1, "S": 1}, {n: p.ctypes.data for n, p in zip("kv", pages)})
    made.view(q, tokens)[...] = np.random.default_rng(0).standard_normal((tokens, H * K), np.float32)
    return made


def random_pages(shape, context, dtype):
    """K and V pages of one request, in a scattered order."""
    (_, G, K), P = shape, -(-context // 64)
    numbers = np.random.default_rng(1).standard_normal((2, P, G, K * 64), np.float32)
    raw = numbers.view(np.uint16)[..., 1::2] if dtype == "bf16" else numbers
    pages = aligned(raw.nbytes).view(raw.dtype).reshape(raw.shape)
    pages[...] = raw
    return pages, np.random.default_rng(2).permutation(P)[None]


def seconds(run, *args):
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


def peak(team):
    """(function that does them, FMA operations) of the whole team."""
    program = Program()
    program.emit("fma", [program.tensor("out", "T", 16)], [])
    made = Executor(program, {"fma": Implementation(fma_peak)}, team, WeightStore(), {"T": 1, "R": 1, "S": 1}, {})
    step, held = ragged_step([1])
    return lambda: made.run(step), 2 * 6 * 16 * CHAINS * team.num_threads


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--context", type=int, default=1000)
    args = parser.parse_args()
    team = Team(args.threads)
    cases = {}
    run_peak, peak_ops = peak(team)
    for name in args.shape or SHAPES:
        H, G, K = shape = SHAPES[name]
        for dtype in ("f32", "bf16"):
            pages, table = random_pages(shape, args.context, dtype)
            for label, tokens, implementation in (("prefill", args.context, attention_cpu.CPU["attention"]),
                                                  ("per_token", args.context, attention_cpu.PER_TOKEN["attention"]),
                                                  ("decode", 1, attention_cpu.CPU["attention"])):
                made = executor(team, implementation, shape, tokens, pages, dtype)
                step, held = ragged_step([tokens], [args.context], table)
                keys = tokens * args.context - tokens * (tokens - 1) // 2
                cases[name, dtype, label] = (made, step, (held, pages), 4 * H * K * keys, pages.nbytes)
    times = {case: [] for case in cases} | {"peak": []}
    for _ in range(args.rounds + 1):
        times["peak"].append(seconds(run_peak))
        for case, (made, step, *_) in cases.items():
            times[case].append(seconds(made.run, step))
    top = peak_ops / np.median(times["peak"][1:])
    print(f"FMA peak, {args.threads} threads: {top / 1e9:.0f} GFLOP/s; context {args.context}")
    for case, (*_, ops, num_bytes) in cases.items():
        took = np.median(times[case][1:])
        print(
            f"{' '.join(case):24} {1e3 * took:9.3f} ms {ops / took / 1e9:7.1f} GFLOP/s = "
            f"{100 * ops / took / top:3.0f} % of peak"
            f" {num_bytes / took / 1e9:6.1f} GB/s"
        )
    team.close()


if __name__ == "__main__":
    main()
