"""Formats against formats, and experts of few and many tokens, in one process: parts of bars.py."""

import statistics

import numpy as np
from bench_versions import interval

from lockstep.formats.parts.rows import ROW_FORMATS
from lockstep.lab.ceiling import Meter
from lockstep.lab.layer_speed import Case, Given, nothing, stored
from lockstep.ops.linear import experts_cpu, linear_cpu
from lockstep.ops.linear.experts import ExpertLinear, ExpertRows
from lockstep.ops.linear.linear import PREPARATION
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor
from lockstep.runtime.operands import Operands, output
from lockstep.runtime.program import Program, Tensor, Weight
from lockstep.runtime.step_block import StepBlock
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore

SHAPES, PROMPT = ("4096x2048", "2048x4096"), 512
# {format: what it is compared with, and for one row by what: bytes of packed weights a second, or weights a second}
AGAINST = {
    "mxfp4": ("q4_0", "bytes"),
    "group4": ("q4_0", "bytes"),
    "group8": ("q4_0", "bytes"),
    "q3_k": ("q4_k", "values"),
    "q2_k": ("q4_k", "values"),
}
BAR = 0.9


def formats(a):
    """{shape: {format: {rows: figures}}}, and a line for each."""
    team, found = Team(a.threads), {}
    print("\n| shape | format | rows | G values/s | GB/s | against | ratio (95 %) | |")
    print("|---|---|---:|---:|---:|---|---:|---|")
    for shape in SHAPES:
        cases = {name: Case(name, shape, PROMPT, team, linear_cpu.CPU) for name in ("q4_0", "q4_k", *AGAINST)}
        for _ in range(2 * a.rounds + 1):  # the first is a warm-up
            for case in cases.values():
                case.run(1), case.run(PROMPT)
        for case in cases.values():
            case.times = {rows: times[1:] for rows, times in case.times.items()}
        found[shape] = {
            name: {rows: compared(cases[name], cases[other], rows, unit) for rows in (1, PROMPT)}
            for name, (other, unit) in AGAINST.items()
        }
        for name, of_rows in found[shape].items():
            for rows, f in of_rows.items():
                print(format_line(shape, name, rows, f), flush=True)
    team.close()
    return found


def compared(case, other, rows, unit):
    """The figures of a format's layer; the ratio is that of its weights (or, of one row, bytes) a second and those of
    the other."""
    unit = unit if rows == 1 else "values"
    size = case.weight_bytes / other.weight_bytes if unit == "bytes" else 1
    ratios = [size * b / a for a, b in zip(case.times[rows], other.times[rows], strict=True)]
    ratio, seconds = statistics.median(ratios), case.seconds(rows)
    return {
        "values_per_second": rows * case.N * case.K / seconds,
        "bytes_per_second": case.weight_bytes / seconds,
        "against": f"{other.format}, {unit}",
        "ratio": round(ratio, 3),
        "interval": [round(end, 3) for end in interval(ratios)],
        "bar": BAR,
        "is_met": ratio >= BAR,
    }


def format_line(shape, name, rows, f):
    low, high = f["interval"]
    rates = f"{f['values_per_second'] / 1e9:.1f} | {f['bytes_per_second'] / 1e9:.1f}"
    met = "met" if f["is_met"] else "**missed**"
    return (
        f"| {shape} | {name} | {rows} | {rates} | {f['against']} | {f['ratio']:.2f} ({low:.2f} to {high:.2f}) | {met} |"
    )


# ------------------------------------------------------------ experts

NUM_EXPERTS, TOP_K, WIDTH, FEATURES = 256, 8, 2048, 1024  # gate and up of Qwen3.5-35B-A3B
TOKENS = (1, 2, 4, 8, 16, 32)


class GivenInts(Operands):
    """The op of whole numbers that are written before a step."""

    out: Tensor = output(dtype="i32")


class ExpertCase:
    """A layer's experts of one format, whose tokens choose as they are told."""

    def __init__(self, format, team):
        rows, program = ROW_FORMATS[PREPARATION[format]], Program()
        self.random = np.random.default_rng(3)
        self.x = program.emit(Given(out=program.tensor("x", "T", WIDTH)))
        self.order = program.emit(GivenInts(out=program.tensor("order", "T", TOP_K, "i32")))
        self.start = program.emit(GivenInts(out=program.tensor("start", "T", NUM_EXPERTS + 1, "i32")))
        out = program.tensor("rows", "T", TOP_K * rows.width(WIDTH), rows.dtype)
        given = dict(width=WIDTH, top_k=TOP_K)
        h = program.emit(ExpertRows(out=out, x=self.x, order=self.order, preparation=PREPARATION[format], **given))
        shape = (NUM_EXPERTS * FEATURES, WIDTH)
        weight = Weight("experts", format, shape, (stored(format, *shape),))
        out = program.tensor("out", "T", TOP_K * FEATURES)
        counts = dict(features=FEATURES, num_experts=NUM_EXPERTS, **given)
        program.emit(ExpertLinear(out=out, x=h, expert_start=self.start, weight=weight, **counts))
        given_kinds = {name: Implementation(nothing) for name in ("given", "given_ints")}
        backend, store = {**experts_cpu.CPU, **given_kinds}, WeightStore()
        self.executor = Executor(program, backend, team, store, {"T": max(TOKENS)}, {}, keep_all=True)
        self.expert_bytes = sum(a.nbytes for a in store.arrays(weight, backend[f"expert_linear_{format}"].layout))
        self.expert_bytes //= NUM_EXPERTS

    def run(self, num_tokens, is_alike):
        """(seconds, experts that were chosen by any token)"""
        draw = lambda: self.random.permutation(NUM_EXPERTS)[:TOP_K]
        same = draw()
        chosen = np.concatenate([same if is_alike else draw() for _ in range(num_tokens)])
        self.executor.view(self.x, num_tokens)[...] = self.random.standard_normal((num_tokens, WIDTH), np.float32)
        self.executor.view(self.order, num_tokens)[...] = np.argsort(chosen, kind="stable").reshape(num_tokens, TOP_K)
        starts = np.searchsorted(np.sort(chosen), np.arange(NUM_EXPERTS + 1))
        self.executor.view(self.start, num_tokens)[0] = starts
        clock = np.zeros(len(self.executor.program.ops), np.int64)
        self.executor.run(StepBlock.made(num_tokens=num_tokens, num_requests=1, num_sampled=1), clock)
        return int(clock[-1] - clock[-2]) / 1e9, len(set(chosen))


def experts(a):
    """{choice: {tokens: figures}}, and a line for each.

    How often the weights can have been read: bytes that memory gives in that time, by the bytes of the chosen experts.
    Below 2 no weight was read twice. Above it arithmetic may be what takes the time.
    """
    team, found = Team(a.threads), {}
    case, meter = ExpertCase("q4_k", team), Meter(team)
    print("\n| experts | tokens | chosen | MB | us | GB/s | read at most |\n|---|---:|---:|---:|---:|---:|---:|")
    for choice in ("the same", "random"):
        found[choice] = {}
        for num_tokens in TOKENS:
            is_alike = choice == "the same"
            runs = [(*case.run(num_tokens, is_alike), meter.run().bytes_per_second) for _ in range(3 * a.rounds)]
            seconds, chosen, ceiling = (statistics.median(values) for values in zip(*runs, strict=True))
            needed = chosen * case.expert_bytes
            reads = seconds * ceiling / needed
            found[choice][num_tokens] = dict(chosen=chosen, bytes=needed, seconds=seconds, reads=round(reads, 2))
            rates = f"{needed / 1e6:.1f} | {seconds * 1e6:.0f} | {needed / seconds / 1e9:.1f}"
            print(f"| {choice} | {num_tokens} | {chosen:.0f} | {rates} | {reads:.2f} times |", flush=True)
    team.close()
    return found
