"""Speed of integer linear layers (`code_linear`) against float32 and q8_0 ones, in the same interleaved rounds.

    python bench/bench_code_linear.py [--shapes 4096x1024] [--rows 512] [--threads 1,2] [--rounds 7]

A shape is features x values; a plan is the bits of weights and activations. Each line: the layer's time, the time for
quantizing its rows, GOP/s of the layer (two for each multiply-add), and how many times as fast as linear_f32 and
linear_q8_0 it is: medians of the ratios within each round, since the cores may be shared.
"""

import itertools
import re
import statistics

import numpy as np
from options import Parser, num_cores, plain_shape, refuse, several, threads, values_of, whole_number

from lockstep.formats import FORMATS
from lockstep.lab.layer_speed import CACHES, Case, Copies, Given, nothing
from lockstep.ops.integer import code_linear_cpu, code_rows_cpu
from lockstep.ops.integer.code_linear import MOST_VALUES, CodeLinear
from lockstep.ops.integer.code_rows import CodeRows, row_width
from lockstep.ops.integer.code_weights import CodeTensor, code_tensor, code_weight
from lockstep.ops.linear import linear_cpu
from lockstep.ops.rounded.grids import INTEGER
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor
from lockstep.runtime.program import Program, Setting
from lockstep.runtime.step_block import StepBlock
from lockstep.runtime.threads import Team

SHAPES, PLANS = "4096x1024,1024x3072", "w8a8,w4a8,w4a16,w8a16"
FLOATS = ("f32", "q8_0")


def symmetric(bits: int, largest: float) -> list[float]:
    """A symmetric integer grid for numbers up to a size, see `ops/rounded/grids.py`."""
    high = 2 ** (bits - 1) - 1
    scale = np.float32(largest / high)
    return [INTEGER, scale, np.float32(1) / scale, 0, -high - 1, high, 0, 0]


class Plan:
    """A layer with weights and activations of so many bits, as often as memory that no cache holds asks for.

    times: {"rows" or "layer": seconds in each round}.
    """

    def __init__(self, name: str, shape: str, rows: int, team: Team) -> None:
        self.name, self.rows, self.times = name, rows, {"rows": [], "layer": []}
        self.N, self.K = map(int, shape.split("x"))
        weight_bits, bits = map(int, name[1:].split("a"))
        program = Program()
        x, coded = program.tensor("x", "T", self.K), program.tensor("coded", "T", row_width(self.K), "i8")
        grid = Setting("grid", np.array([symmetric(bits, 4.0)], np.float32))
        program.emit(Given(out=x))
        program.emit(CodeRows(out=coded, x=x, grid=grid, width=self.K))
        sizes = dict(in_features=self.K, out_features=self.N, width=self.N, column=0)
        out, part = program.tensor("out", "T", self.N), random_weight(weight_bits, self.N, self.K)
        for i in range(max(2, -(-CACHES // (self.N * self.K)))):
            program.emit(CodeLinear(out=out, x=coded, weight=code_weight(f"w{i}", part), **sizes))
        table = {**code_rows_cpu.CPU, **code_linear_cpu.CPU, "given": Implementation(nothing)}
        self.executor = Executor(program, table, team, Copies(), {"T": rows}, {}, keep_all=True)
        self.executor.view(x, rows)[...] = np.random.default_rng(1).standard_normal((rows, self.K), np.float32)

    def run(self) -> None:
        """Runs all copies once; what most of them took counts."""
        clock = np.zeros(len(self.executor.program.ops), np.int64)
        self.executor.run(StepBlock.made(num_tokens=self.rows, num_requests=1, num_sampled=1), clock)
        self.times["rows"].append(float(clock[1] - clock[0]) / 1e9)
        self.times["layer"].append(float(np.median(np.diff(clock[1:]))) / 1e9)


def random_weight(bits: int, N: int, K: int) -> CodeTensor:
    """Random codes [N, K] of a number of bits."""
    most = 2 ** (bits - 1)
    codes = np.random.default_rng(0).integers(-most, most, (N, K))
    return code_tensor("w", codes, np.full(N, 0.01, np.float32), np.zeros(N, np.int32))


def compare(shape: str, rows: int, names: list[str], threads: int, rounds: int) -> None:
    """Prints a line for each plan."""
    team = Team(threads)
    floats = [Case(format, shape, rows, team, linear_cpu.CPU) for format in FLOATS]
    plans = [Plan(name, shape, rows, team) for name in names]
    for _ in range(rounds + 1):  # the first warms up
        for each in (*floats, *plans):
            each.run(rows) if isinstance(each, Case) else each.run()
    seen = {case.format: case.times[rows][1:] for case in floats} | {p.name: p.times["layer"][1:] for p in plans}
    work = 2 * rows * plans[0].N * plans[0].K / 1e9
    preparing = {p.name: statistics.median(p.times["rows"][1:]) for p in plans}
    for name, times in seen.items():
        seconds = statistics.median(times)
        ratios = [statistics.median(a / b for a, b in zip(seen[base], times, strict=True)) for base in FLOATS]
        print(
            f"{name:6s} {shape:10s} rows {rows:4d} threads {threads}  layer {seconds * 1e6:8.0f} us  "
            f"rows {preparing.get(name, 0) * 1e6:6.0f} us  {work / seconds:7.0f} GOP/s  "
            f"{ratios[0]:5.2f}x f32  {ratios[1]:5.2f}x q8_0",
            flush=True,
        )
    team.close()


def plan(text: str) -> str:
    """The name of a plan."""
    return text if re.fullmatch("w[2-8]a([2-9]|1[0-6])", text) else refuse(text, "2 to 8 and 2 to 16 bits, as w4a16")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--shapes", type=several(plain_shape), default=SHAPES)
    parser.add_argument("--plans", type=several(plan), default=PLANS)
    parser.add_argument("--rows", type=several(whole_number()), default="512")
    parser.add_argument("--threads", type=several(threads), default="1,2" if num_cores() > 1 else "1")
    parser.add_counts(rounds=7)
    args = parser.parse_args()
    formats = {name: FORMATS[name].block_size for name in FLOATS}
    parser.check_blocks({f"--shapes {shape}": values_of(shape) for shape in args.shapes}, formats)
    if (most := max(map(values_of, args.shapes))) > MOST_VALUES:
        parser.error(f"--shapes: expected at most {MOST_VALUES} values in integers, got {most}")
    for shape, rows, num_threads in itertools.product(args.shapes, args.rows, args.threads):
        compare(shape, rows, args.plans, num_threads, args.rounds)


if __name__ == "__main__":
    main()
