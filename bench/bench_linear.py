"""Speed of the linear layers against the ceilings of this machine, which are measured in the same run.

    python bench/bench_linear.py [--formats q8_0,bf16] [--rows 1,4,512] [--shapes 4096x1024] [--per-token] [--threads 2]

A shape is features x values; for a block-diagonal layer (`grouped_linear`) it is features of all groups x values of one
group x groups, as 8192x4096x8. Each format, shape and number of rows has one line: time, GOP/s (two for each
multiply-add), GB/s of packed weights, and both as shares of the ceilings. Each layer has several copies, whose weights
together exceed the caches, so that one row reads from memory as in a model. --per-token: also the baseline, which reads
the weights anew for each row, and how many times as long the baseline takes. Ceilings, formats and rows are
interleaved; medians of the rounds are reported.
"""

import argparse
import itertools
import statistics
import threading
import time

from numba import njit

from lockstep.formats import FORMATS
from lockstep.lab.layer_speed import CACHES, Case
from lockstep.native.kernel import STRICT
from lockstep.native.peak import CHAINS, lanes_per_register, peak_f32, peak_int8
from lockstep.native.simd import load, store
from lockstep.ops.linear import linear_cpu
from lockstep.runtime.executor import aligned
from lockstep.runtime.threads import Team

SHAPES = ["4096x1024", "1024x2048", "6144x1024", "1024x3072", "151936x1024"]


@njit(**STRICT)
def spin_f32(num_rounds, out):
    peak_f32(num_rounds, out)


@njit(**STRICT)
def spin_int8(num_rounds, out):
    peak_int8(num_rounds, out)


@njit(**STRICT)
def read_all(start, size):
    """Reads memory as one stream; the sum that it returns keeps the compiler from dropping the reads."""
    a, b = load(start), load(start)
    for i in range(0, size, 128):
        a, b = a + load(start + i), b + load(start + i + 64)
    return a + b


@njit(**STRICT)
def read_bytes(start, size, out):
    store(out, read_all(start, size))


def in_threads(num_threads, work):
    """Seconds until work(thread) has returned in all threads."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


class Ceilings:
    """float32 and int8 GOP/s and GB/s of this machine, measured again in every round: the cores may be shared."""

    def __init__(self, num_threads):
        self.num_threads, self.lanes = num_threads, lanes_per_register()
        self._measured = {"float32": [], "int8": [], "read": []}
        self._memory = aligned(2 * CACHES)
        self._memory[:] = 1
        self._out = aligned(4096 * num_threads)
        self.measure()
        self._measured = {name: [] for name in self._measured}

    def measure(self):
        num_rounds, start, out, n = 1_000_000, self._memory.ctypes.data, self._out.ctypes.data, self.num_threads
        size = len(self._memory) // n // 128 * 128
        work = CHAINS * self.lanes * 2 * num_rounds * n / 1e9
        self._measured["float32"].append(work / in_threads(n, lambda i: spin_f32(num_rounds, out + 4096 * i)))
        self._measured["int8"].append(4 * work / in_threads(n, lambda i: spin_int8(num_rounds, out + 4096 * i)))
        self._measured["read"].append(
            size * n / in_threads(n, lambda i: read_bytes(start + i * size, size, out + 4096 * i)) / 1e9
        )

    def median(self, name):
        return statistics.median(self._measured[name])

    def __str__(self):
        return (
            f"ceilings, {self.num_threads} threads: float32 {self.median('float32'):.0f} GOP/s, "
            f"int8 {self.median('int8'):.0f} GOP/s,"
            f" read {self.median('read'):.1f} GB/s"
        )


def report(case, rows, ceilings, fast_case=None):
    """Prints a line. fast_case: if `case` is a baseline, the case to compare it with."""
    seconds = case.seconds(rows)
    gops, times_read = 2 * rows * case.N * case.K / seconds / 1e9, rows if fast_case else 1
    read = times_read * case.weight_bytes / seconds / 1e9
    peak = ceilings.median("int8" if FORMATS[case.format].is_quantized else "float32")
    times = f"  per token: {seconds / fast_case.seconds(rows):.2f} times as long" if fast_case else ""
    print(
        f"{case.format:5s} {case.shape:14s} rows {rows:4d}  {seconds * 1e6:9.1f} us  "
        f"{gops:7.1f} GOP/s {gops / peak:5.0%}"
        f"  {read:5.1f} GB/s {read / ceilings.median('read'):5.0%}{times}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default="1,2,4,8,512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--per-token", action="store_true", help="also the baseline, one row at a time")
    args = parser.parse_args()
    tables = [linear_cpu.CPU, linear_cpu.PER_TOKEN][: 1 + args.per_token]
    rows = [int(r) for r in args.rows.split(",")]
    team, ceilings = Team(args.threads), Ceilings(args.threads)
    for shape in args.shapes.split(","):
        cases = [Case(format, shape, max(rows), team, table) for format in args.formats.split(",") for table in tables]
        for _ in range(args.rounds):
            ceilings.measure()
            for case, r in itertools.product(cases, rows):
                case.run(r)
        for i, r in itertools.product(range(len(cases)), rows):
            report(cases[i], r, ceilings, cases[i - 1] if cases[i].table is linear_cpu.PER_TOKEN else None)
    print(ceilings)
    team.close()


if __name__ == "__main__":
    main()
