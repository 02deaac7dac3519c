"""Into how many tasks each op of a step is cut, how long they take, and what they read, measured on one thread.

One thread takes the part of each of N threads in turn, so that the shares of 64 threads can be measured on a machine of
two cores. Where shares are dealt, each is timed. Where tasks are claimed, the first thread claims all of them: their
number and their sum are measured, and tasks of one op count as equal.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lockstep.engine.cache.pages import everywhere, pages_for
from lockstep.engine.runner import Limits, Runnable, Runner, Span
from lockstep.lab.ceiling import Ceiling, Work, measure
from lockstep.lab.describe import is_linear, packed_bytes
from lockstep.lab.parity import GREEDY
from lockstep.native.kernel import kernel
from lockstep.native.numbers import int64
from lockstep.native.simd import peek, poke
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor, aligned
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import DTYPES, CacheArray, Program, Tensor, Weight
from lockstep.runtime.step_block import StepBlock
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore

NUM_BARRIERS, RUNS = 100, 30  # of one measurement; the least of so many counts
PAUSE = 2e-3  # seconds between them
TEAMS = 5  # whose barriers are measured: other programs may drive the threads of one to the same core
PASSED = 1 << 18  # bytes that a thread reads of another one's: they fit into its near caches
IDLE = 2  # times the shortest share of any op, up to which a share that is dealt has no work in it
LOW = 0.25  # quantile of shares' times that counts: other programs only make times longer
SECONDS = 0.05  # that a step is measured for in a round, at least


@dataclass(frozen=True)
class Workload:
    """A step: requests with some new tokens each, after a context."""

    name: str
    requests: int
    tokens: int
    context: int

    def rows(self, letter: str) -> int:
        """How many rows there are of a letter."""
        return 0 if letter == "E" else self.requests * (self.tokens if letter == "T" else 1)

    def spans(self, ids: Sequence[int]) -> list[Span]:
        """The requests, with pages of their own."""
        end = self.context + self.tokens
        pages, asked = pages_for(end), {self.tokens - 1: GREEDY}
        made = [everywhere(range(pages * s, pages * (s + 1))) for s in range(self.requests)]
        return [Span(list(ids[self.context : end]), self.context, p, s, asked) for s, p in enumerate(made)]


@dataclass
class Like:
    """Ops of a step that differ in their weights only. Seconds and bytes are those of one of them.

    meets: after how many of them threads meet. num_bytes: of weights and caches that it reads. passed: bytes of
    activations that it reads and writes, most of which other threads had before. alone: seconds on one
    thread. tasks: {threads: into how many tasks it is cut}; where shares are dealt, how many threads have work.
    longest: {threads: seconds of the longest share}.
    """

    label: str
    count: int
    meets: int
    num_bytes: int
    passed: int = 0
    alone: float = 0.0
    tasks: dict[int, int] = field(default_factory=dict)
    longest: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """A workload's ops, and the least seconds of the whole step on one thread and on all threads of the team."""

    workload: Workload
    ops: list[Like]
    alone: float
    together: float


@dataclass(frozen=True)
class Machine:
    """Threads of the team; the ceilings of one thread and of all; seconds that threads take to meet, all of them, and
    that it takes longer to read a byte which another core has written."""

    num_threads: int
    alone: Ceiling
    together: Ceiling
    barrier: float
    passing: float


def machine(team: Team) -> Machine:
    """Measures this machine."""
    single, count = Team(1), team.num_threads
    barriers = passing = 0.0  # of one thread
    if count > 1:
        barriers = max(0.0, min(_op_seconds(Team(count)) for _ in range(TEAMS)) - _op_seconds(single))
        passing = max(0.0, _passing(team) - _passing(single))
    found = Machine(count, measure(single), measure(team), barriers, passing)
    single.close()
    return found


@kernel
def nothing(op, step, thread, num_threads):
    """Does nothing, so that an op is its barrier."""


@kernel
def write_next(op, step, thread, num_threads):
    """Writes the part that the next thread will read."""
    work = Work.read(op)
    first = work.address + (thread + 1) % num_threads * work.amount
    for place in range(first, first + work.amount, 64):
        poke(place, place)


@kernel
def read_own(op, step, thread, num_threads):
    """Reads the part that another thread has written."""
    work, total = Work.read(op), 0
    first = work.address + thread * work.amount
    for place in range(first, first + work.amount, 64):
        total += peek(place, int64)
    poke(work.out + 64 * thread, total)


def _passing(team: Team) -> float:
    """The least seconds that a thread takes to read a byte which another one, if there is one, has written."""
    program, memory = Program(), aligned(PASSED * team.num_threads)
    out = program.tensor("out", "T", 16 * team.num_threads)
    kinds = {"write": Implementation(write_next), "read": Implementation(read_own)}
    for kind in kinds:
        program.emit(Passing(out=out, address=memory.ctypes.data, amount=PASSED, step=kind))
    executor, clock = Executor(program, kinds, team, WeightStore(), {"T": 1}, {}), np.zeros(2, np.int64)
    step, found = StepBlock.made(num_tokens=1), []
    for _ in range(RUNS):
        executor.run(step, clock)
        found.append(int(clock[1] - clock[0]))
    return min(found) / 1e9 / PASSED


class Passing(Work):
    """Work whose kind is its step, "write" or "read"."""

    step: str

    @property
    def kind(self):
        return self.step


def _op_seconds(team: Team) -> float:
    """The least seconds of an op that does nothing."""
    program = Program()
    out = program.tensor("out", "T", 16)
    for _ in range(NUM_BARRIERS):  # each writes what the one before has written, so that threads meet
        program.emit(Work(out=out, address=0, amount=0))
    executor = Executor(program, {"work": Implementation(nothing)}, team, WeightStore(), {"T": 1}, {})
    step = StepBlock.made(num_tokens=1)
    found = []
    for _ in range(RUNS):
        time.sleep(PAUSE)
        found.append(_seconds(lambda: executor.run(step)))
    return min(found) / NUM_BARRIERS


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _repeated(run: Callable[[], object]) -> list[float]:
    """Seconds of each of several runs."""
    found = [_seconds(run)]
    while sum(found) < SECONDS:
        found.append(_seconds(run))
    return found


class Rig:
    """A model on one thread and on a team, with memory for some workloads."""

    def __init__(self, model: Runnable, vocab_size: int, team: Team, workloads: Sequence[Workload]) -> None:
        longest = max(w.context + w.tokens for w in workloads)
        rows, requests = max(w.requests * w.tokens for w in workloads), max(w.requests for w in workloads)
        limits = Limits(rows, requests, max(w.requests * pages_for(w.context + w.tokens) for w in workloads), requests)
        self._ids = np.random.default_rng(7).integers(0, vocab_size, longest).tolist()
        self._single = Team(1)
        self._alone, self._together = (Runner(model, each, limits) for each in (self._single, team))

    def close(self) -> None:
        """Ends the thread that was made here."""
        self._single.close()

    def measure(self, workload: Workload, threads: Sequence[int], rounds: int) -> Measured:
        """Measures a workload in rounds, in which all measurements take turns. threads: beside 1."""
        alone, together = self._alone.executor, self._together.executor
        spans = workload.spans(self._ids)
        step, step_together = self._alone.prepare(spans), self._together.prepare(spans)
        counts = sorted({1, *threads})
        times, seconds = {count: [] for count in counts}, ([], [])
        for i in range(rounds + 1):
            measured = [_repeated(lambda: alone.run(step)), _repeated(lambda: together.run(step_together))]
            for count in counts:
                found = alone.run_in_turns(step, count)
                if i:  # the first round warms up
                    times[count].append(found)
            for kept, values in zip(seconds, measured, strict=True):
                kept += values if i else []
        ops = _likes(self._alone.program.ops, alone.meets_after(), workload, times)
        return Measured(workload, ops, *(min(kept) for kept in seconds))


def _likes(ops: Sequence[Operands], meets: Sequence[bool], workload: Workload, times) -> list[Like]:
    """Ops by what they have in common, in the order of the program. times: {threads: what rounds of `run_in_turns`
    gave}."""
    groups: dict[tuple[str, int, int], list[int]] = {}
    for i, op in enumerate(ops):
        groups.setdefault((_label(op), op_bytes(op, workload), passed_bytes(op, workload)), []).append(i)
    found, shortest = [], {count: min(one.min() for one, _ in rounds) / 1e9 for count, rounds in times.items()}
    for (label, num_bytes, passed), indices in groups.items():
        like = Like(label, len(indices), sum(meets[i] for i in indices), num_bytes, passed)
        for count, rounds in times.items():
            shares = np.quantile([one[indices] for one, _ in rounds], LOW, axis=(0, 1)) / 1e9
            claims = int(rounds[-1][1][indices[0]])
            like.tasks[count] = claims or int((shares > IDLE * shortest[count]).sum())
            like.longest[count] = float(shares.sum() / claims * math.ceil(claims / count) if claims else shares.max())
        like.alone = like.longest[1]
        found.append(like)
    return found


def _label(op: Operands) -> str:
    shapes = ["x".join(map(str, w.shape)) for w in op.packed if is_linear(op)]
    return f"{op.kind} {shapes[0] if shapes else op.outputs[0].width if op.outputs else ''}"


def op_bytes(op: Operands, workload: Workload) -> int:
    """Bytes of weights and caches that an op reads in a step. Of experts, as many are read as rows choose; pages are
    read by ops that look back on the context, others only write to them."""
    rows, total = workload.rows(op.rows), 0.0
    for value in op.inputs:
        if isinstance(value, Weight) and is_linear(op) and value in op.packed:
            chosen = op.flops(0) // 2 * rows / math.prod(value.shape)
            total += packed_bytes(op, value) * min(1.0, chosen)
        elif isinstance(value, CacheArray) and (value.kind != "pages" or op.flops(1) > op.flops(0)):
            total += value.bytes_each * workload.requests * _slots(value, workload)
    return int(total)


def passed_bytes(op: Operands, workload: Workload) -> int:
    """Bytes of activations that an op reads and writes; 0 of one that works only for rows which ask for it."""
    if not op.kept:
        return 0
    tensors = [value for value in (*op.inputs, *op.outputs) if isinstance(value, Tensor)]
    return sum(
        workload.rows(t.rows) * t.width * DTYPES[t.dtype].itemsize
        for t in tensors
        if t not in op.outputs or t in op.kept
    )


def _slots(cache: CacheArray, workload: Workload) -> float:
    """How many pages or slots of a cache a request reads."""
    if cache.kind != "pages":
        return 1
    return min(workload.context + workload.tokens, cache.window + workload.tokens if cache.window else 1 << 60) / (
        PAGE_TOKENS
    )
