"""Elementwise ops: time and memory traffic, batched over threads against one token at a time on one thread.

    python bench/bench_elementwise.py [--threads 2] [--rounds 15]

Both forms and NumPy's sum of two arrays (on one thread: the bandwidth of one core) run interleaved; medians of the
rounds. GB/s counts once what an op must read and write.
"""

import time

import numpy as np
from options import Parser

from lockstep.native.kernel import kernel
from lockstep.ops.elementwise import add_cpu, gated_mul_cpu, rms_norm_cpu
from lockstep.ops.elementwise.add import Add
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor
from lockstep.runtime.program import Program
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from tests.ops.harness import Given, ragged_step, weight

SHAPES = [(1, 1024), (512, 1024), (512, 6144)]


@kernel
def nothing(op, step, thread, num_threads):
    """A kernel in the place of the ops that produce the inputs."""


def emit(program, kind, width):
    """Records one op; returns the float32 numbers it reads and writes per token."""
    x, y = (program.emit(Given(out=program.tensor(name, "T", width))) for name in "xy")
    out_width = width // 2 if kind == "silu_mul" else width
    operands = dict(out=program.tensor("out", "T", out_width), x=x, width=out_width)
    if kind == "silu_mul":
        program.emit(GatedMul(activation="silu", **operands))
    elif kind == "add":
        program.emit(Add(y=y, **operands))
    else:
        program.emit(RmsNorm(weight=weight(np.ones(width), f"norm{width}"), eps=1e-6, offset=0.0, **operands))
    return width + out_width + (width if kind == "add" else 0)


def build(table, kind, num_tokens, width, team):
    program = Program()
    numbers = emit(program, kind, width)
    executor = Executor(
        program,
        {**table, "given": Implementation(nothing)},
        team,
        WeightStore(),
        {"T": num_tokens, "R": 1, "S": 1},
        {},
        keep_all=True,
    )
    executor.fill(0x3F)  # float32 of 0.747
    return executor, 4 * numbers * num_tokens


def seconds(call, repeat):
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - started) / repeat


def compare(kind, num_tokens, width, team, rounds):
    tables = {
        "batched": {**add_cpu.CPU, **rms_norm_cpu.CPU, **gated_mul_cpu.CPU},
        "per token": {**add_cpu.PER_TOKEN, **rms_norm_cpu.PER_TOKEN, **gated_mul_cpu.PER_TOKEN},
    }
    step, _held = ragged_step([num_tokens])
    runs, moved = {}, 0
    for name, table in tables.items():
        executor, moved = build(table, kind, num_tokens, width, team)
        runs[name] = lambda executor=executor: executor.run(step)
    a, b, c = (np.full(num_tokens * width, 0.5, np.float32) for _ in range(3))
    runs["numpy add"] = lambda: np.add(a, b, out=c)
    repeat = max(1, (1 << 21) // (num_tokens * width))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            times[name].append(seconds(call, repeat))
    bytes_of = {"batched": moved, "per token": moved, "numpy add": 3 * a.nbytes}
    return {name: (np.median(t), bytes_of[name] / np.median(t)) for name, t in times.items()}


def main():
    parser = Parser(__doc__)
    parser.add_threads()
    parser.add_counts(rounds=15)
    args = parser.parse_args()
    team = Team(args.threads)
    print(f"{'op':10} {'shape':14}" + "".join(f"{n:>24}" for n in ("batched", "per token", "numpy add")))
    for kind in ("add", "silu_mul", "rms_norm"):
        for num_tokens, width in SHAPES:
            result = compare(kind, num_tokens, width, team, args.rounds)
            cells = "".join(f"{1e6 * t:12.1f} us {rate / 1e9:5.1f} GB/s" for t, rate in result.values())
            print(f"{kind:10} {f'[{num_tokens}, {width}]':14}{cells}")
    team.close()


if __name__ == "__main__":
    main()
