"""Measurements of a model on this machine: prefill, decode, A/B comparisons, and a profile of its ops.

The two sides of a comparison run alternately in one process, and a ratio is the median of the ratios of paired runs:
machines are noisy, and times of different moments cannot be compared.
"""

import math
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere, pages_for
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.formats import FORMATS
from lockstep.lab.describe import is_linear, packed_bytes
from lockstep.lab.parity import GREEDY
from lockstep.ops import BACKENDS
from lockstep.runtime.operands import GROUPS

CHUNKS = (64, 512)  # tokens of a chunk that whole prompts are compared in
LONG_SECONDS = 5.0  # of a pair of runs, from which on each pair is told of


class Bench:
    """A model's runners, one for each op table, all on one team and one set of weights."""

    def __init__(self, model, team, max_tokens, chunk: int = 512) -> None:
        self.model, self.team, self.chunk = model, team, chunk
        self._limits = Limits(chunk, 1, pages_for(max_tokens), 1)
        self._runners = {}
        self._ids = np.random.default_rng(7).integers(0, model.config.vocab_size, max_tokens).tolist()

    def runner(self, swaps=None):
        """The Runner of an op table, made at its first use. swaps: {kind or group of ops: backend}."""
        key = tuple(sorted((swaps or {}).items()))
        if key not in self._runners:
            self._runners[key] = Runner(self.model, self.team, self._limits, swaps)
        return self._runners[key]

    def prefill(self, num_tokens, chunk=None, swaps=None):
        """Runs a prompt in chunks; returns (seconds, logits of its last position)."""
        runner, size = self.runner(swaps), chunk or self.chunk
        started = time.perf_counter()
        for start in range(0, num_tokens, size):
            logits = runner.step([self._span(start, min(start + size, num_tokens), num_tokens)])[2]
        return time.perf_counter() - started, logits[0].copy()

    def per_token(self, num_tokens):
        """Runs a prompt one token at a time, with the LM head only for the last one; returns (seconds, logits)."""
        return self.prefill(num_tokens, 1)

    def decode(self, context, steps: int = 16, swaps=None):
        """Seconds per token of `steps` steps of one token after `context` tokens, whose cache content is arbitrary."""
        runner = self.runner(swaps)
        started = time.perf_counter()
        for i in range(context, context + steps):
            runner.step([self._span(i, i + 1, i + 1)])
        return (time.perf_counter() - started) / steps

    def _span(self, start, end, num_tokens):
        pages = everywhere(range(pages_for(end)))
        return Span(self._ids[start:end], start, pages, 0, {end - start - 1: GREEDY} if end == num_tokens else {})

    def profile(self, num_tokens, context: int = 0, repeat: int = 3):
        """Median seconds of every op of one step: [(op, seconds), ...] in the order of the program."""
        runner, ops = self.runner(), self.runner().program.ops
        clock, rows = np.zeros(len(ops), np.int64), []
        span = self._span(context, context + num_tokens, context + num_tokens)
        for _ in range(repeat):
            started = time.monotonic_ns()
            runner.step([span], clock)
            rows.append(np.diff(clock, prepend=started))
        return list(zip(ops, np.median(rows, axis=0) / 1e9, strict=True))


@dataclass(frozen=True)
class Paired:
    """A against B, run alternately: the median seconds of each, and the median of the paired ratios A / B."""

    a_seconds: float
    b_seconds: float
    ratio: float
    spread: tuple[float, float]  # smallest and largest ratio


def paired(run_a, run_b, repeat, say=lambda text: None):
    """Runs two functions, which return their seconds, in pairs whose order alternates; returns a Paired. say: is told
    of each pair of long runs."""
    times = []
    for i in range(repeat):
        if i and sum(times[-1]) > LONG_SECONDS:
            say(f"pair {i + 1} of {repeat}")
        first, second = (run_a, run_b) if i % 2 == 0 else (run_b, run_a)
        one, two = first(), second()
        times.append((one, two) if i % 2 == 0 else (two, one))
    ratios = [a / b for a, b in times]
    return Paired(
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
    )


def chunk_sizes(num_tokens, largest):
    """The chunks that a prompt is compared in. Those that hold all of it are the same: only the smallest is there."""
    holding = [size for size in CHUNKS if size >= num_tokens]
    return [size for size in CHUNKS if size <= largest and size not in holding[1:]]


def against_per_token(bench, num_tokens, repeat, say=lambda text: None):
    """One token at a time against chunks: ({name: Paired}, the largest difference between their logits). say: is told
    what is measured next."""
    say(f"{num_tokens} tokens, one at a time")
    reference = bench.per_token(num_tokens)[1]
    results, largest = {}, 0.0
    for size in chunk_sizes(num_tokens, bench.chunk):
        name = f"chunks of {size}"
        stage = f"{num_tokens} tokens, one at a time against {name}"
        say(stage)
        largest = max(largest, float(np.abs(bench.prefill(num_tokens, size)[1] - reference).max()))
        results[name] = paired(
            lambda: bench.per_token(num_tokens)[0],
            lambda size=size: bench.prefill(num_tokens, size)[0],
            repeat,
            lambda pair, stage=stage: say(f"{stage}, {pair}"),
        )
    return results, largest


def switch_ratios(bench, num_tokens, repeat, say=lambda text: None):
    """Prefill with the per-token kernels of a group of ops against prefill with its batched ones, {group: Paired}. say:
    is told what is measured next."""
    results, single = {}, BACKENDS["per_token"]
    groups = {op.group for op in bench.model.program.ops if op.kind in single}
    for name in (group for group in GROUPS if group in groups):
        swaps, stage = {name: "per_token"}, f"{name}, per token against batched"
        say(stage)
        bench.prefill(num_tokens, swaps=swaps)
        results[name] = paired(
            lambda swaps=swaps: bench.prefill(num_tokens, swaps=swaps)[0],
            lambda: bench.prefill(num_tokens)[0],
            repeat,
            lambda pair, stage=stage: say(f"{stage}, {pair}"),
        )
    return results


def summed(profile, rows):
    """A profile by kind of op: [(kind, seconds, weight bytes read, multiply-adds with weights, int8), ...], the slowest
    first.

    rows: {letter of rows: their number}. int8: whether the weights are multiplied as integers. Of experts, no more are
    counted as read than rows are routed to experts.
    """
    totals = defaultdict(lambda: [0.0, 0, 0, False])
    for op, seconds in profile:
        total, macs = totals[op.kind], op.flops(0) // 2 * rows[op.rows]
        total[0] += seconds
        for weight in op.packed if is_linear(op) else ():
            total[1] += int(packed_bytes(op, weight) * min(1, macs / math.prod(weight.shape)))
            total[2] += macs
            total[3] = FORMATS[weight.format].is_quantized
    return sorted(((kind, *t) for kind, t in totals.items()), key=lambda row: -row[1])
