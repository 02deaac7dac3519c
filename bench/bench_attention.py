"""Speed of attention by model shape and type of cache, in shares of this machine's float32 peak and memory bandwidth.

    python bench/bench_attention.py [--threads 2] [--rounds 5] [--shape qwen3] [--dtype q8] [--prefill 1000]
                                    [--contexts 1024,8192,32768] [--per-token]

Cases are prefill, decode and, with --per-token, prefill in which each token reads K and V by itself. All cases run
interleaved in one process; medians of the rounds. A multiply-add counts as two operations; only visible
keys count. GB/s counts every byte of K and V once. Decode runs on the pages of several layers, one after the other as
in a model, so many that they do not fit in any cache.
"""

import time

import numpy as np
from options import Parser, several, whole_number

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
PAST_CACHES = 192 << 20  # bytes: more than any cache keeps from one step to the next
SCALE = 0x3CA4  # bfloat16 of 0.02


@kernel
def nothing(op, step, thread, num_threads):
    """In place of the op that computes the queries, which are given."""


class Case:
    """Attention of num_tokens queries at the end of a context, in num_layers layers with pages of their own."""

    def __init__(self, team, backend, shape, dtype, num_tokens, context, num_layers):
        (H, G, K), program = shape, Program()
        pages = [random_pages(shape, context, dtype, part) for _ in range(num_layers) for part in (0, 1)]
        q, out, stats = (program.tensor(n, "T", w) for n, w in (("q", H * K), ("out", H * K), ("stats", 2 * H)))
        program.emit(Given(out=q))
        for i in range(num_layers):
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
            {"T": num_tokens, "R": 1, "S": 1},
            {f"{i // 2}{i % 2}": p.ctypes.data for i, p in enumerate(pages)},
        )
        self._executor.view(q, num_tokens)[...] = np.random.default_rng(0).standard_normal((num_tokens, H * K))
        table = np.random.default_rng(2).permutation(len(pages[0]))[None]
        self._step, self._step_arrays = ragged_step([num_tokens], [context], table)
        self._pages, self._num_layers = pages, num_layers
        self.num_bytes = 2 * context * pages[0][0].nbytes // PAGE_TOKENS
        self.num_operations = 4 * H * K * (num_tokens * context - num_tokens * (num_tokens - 1) // 2)

    def seconds(self):
        """The time of one layer."""
        started = time.perf_counter()
        self._executor.run(self._step)
        return (time.perf_counter() - started) / self._num_layers


def random_pages(shape, context, dtype, part):
    """Pages of K (part 0) or V of one request."""
    (_, G, K), element = shape, DTYPES[ELEMENTS[dtype]]
    page_shape, rng = page_shapes(G, K, dtype)[part], np.random.default_rng(part)
    size = -(-context // PAGE_TOKENS) * int(np.prod(page_shape))
    pages = aligned(size * element.itemsize).view(element).reshape(-1, *page_shape)
    if dtype == "q8":
        pages[...] = rng.integers(-127, 128, pages.shape, np.int8)
        pages[..., -SCALE_BYTES * PAGE_TOKENS :].view(np.uint16)[...] = SCALE
    else:
        numbers = rng.standard_normal(pages.shape, np.float32)
        pages[...] = numbers.view(np.uint16).reshape(*pages.shape, 2)[..., 1] if dtype == "bf16" else numbers
    return pages


def make_cases(args, team):
    """{(shape, dtype, work): Case}"""
    cases = {}
    for name in args.shape or ["qwen3"]:
        (_, G, K), length = SHAPES[name], args.prefill
        for dtype in args.dtype or KV_DTYPES:
            if length:
                cases[name, dtype, f"prefill {length}"] = Case(team, "cpu", SHAPES[name], dtype, length, length, 1)
            if length and args.per_token:
                case = Case(team, "per_token", SHAPES[name], dtype, length, length, 1)
                cases[name, dtype, f"per token {length}"] = case
            for context in args.contexts:
                layer_bytes = 2 * context * G * K * {"f32": 4, "bf16": 2, "q8": 1}[dtype]
                num_layers = max(1, -(-PAST_CACHES // layer_bytes))
                cases[name, dtype, f"decode {context}"] = Case(team, "cpu", SHAPES[name], dtype, 1, context, num_layers)
    return cases


def main():
    parser = Parser(__doc__)
    parser.add_threads()
    parser.add_counts(rounds=5)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--dtype", choices=KV_DTYPES, action="append")
    parser.add_argument(
        "--prefill", type=whole_number(0), default=1000, metavar="TOKENS", help="tokens of a prompt; 0: no prefill"
    )
    contexts = dict(default="1024,8192,32768", help='context lengths of decode; "": no decode')
    parser.add_argument("--contexts", type=several(whole_number(), or_none=True), **contexts)
    parser.add_argument("--per-token", action="store_true", help="also prefill with the per_token backend")
    args = parser.parse_args()
    if not (args.prefill or args.contexts):
        parser.error("--prefill 0 and --contexts '': expected tokens for one of them")
    team = Team(args.threads)
    cases = make_cases(args, team)
    times, ceilings = {name: [] for name in cases}, []
    for _ in range(args.rounds + 1):  # the first warms up
        ceilings.append(ceiling.measure(team))
        for name, case in cases.items():
            times[name].append(case.seconds())
    f32, memory = (np.median([getattr(c, name) for c in ceilings]) for name in ("f32_per_second", "bytes_per_second"))
    print(f"{args.threads} threads: float32 {f32 / 1e9:.0f} GFLOP/s, memory {memory / 1e9:.1f} GB/s")
    for name, case in cases.items():
        took = np.median(times[name][1:])
        ops, read = case.num_operations / took, case.num_bytes / took
        print(
            f"{' '.join(name):26} {1e3 * took:9.3f} ms {ops / 1e9:7.1f} GFLOP/s = {100 * ops / f32:3.0f} % of float32"
            f" {read / 1e9:6.1f} GB/s = {100 * read / memory:3.0f} %"
        )
    team.close()


if __name__ == "__main__":
    main()
