"""Measures the time of single linear layers with random weights.

A layer is copied so often that the weights of all copies exceed the caches: they are read from memory, as in a model.
"""

import statistics
from functools import partial

import numpy as np

from lockstep.formats import FORMATS
from lockstep.native.kernel import kernel
from lockstep.ops.elementwise import activations_cpu
from lockstep.ops.linear import linear_cpu
from lockstep.ops.linear.grouped_linear import GroupedLinear
from lockstep.ops.linear.linear import Linear
from lockstep.ops.rewrite import lower
from lockstep.runtime.backend import Implementation, OpTable
from lockstep.runtime.executor import Executor, aligned
from lockstep.runtime.operands import Operands, output
from lockstep.runtime.program import Program, Tensor, Weight
from lockstep.runtime.step_block import StepBlock
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from lockstep.weights.tensor import StoredTensor

CACHES = 96 * 2**20  # bytes of weights that no cache holds


class Given(Operands):
    """The op of activations that are written before a step."""

    out: Tensor = output()


@kernel
def nothing(op, step, thread, num_threads):
    """The kernel of Given: does nothing."""


def stored(format: str, N: int, K: int) -> StoredTensor:
    """A random weight [N, K] as a checkpoint stores it."""
    rng, made = np.random.default_rng(0), FORMATS[format]
    if made.stored.encode is not None:
        values = rng.standard_normal((N, K), np.float32) * np.float32(0.05)
        return StoredTensor("w", format, (N, K), made.data_of(values))
    blocks = rng.integers(0, 256, (N, K // made.block_size, made.block_bytes), np.uint8)
    made.put_scales(blocks, made.made_up_scale)  # random ones might be denormal, and multiply more slowly
    return StoredTensor("w", format, (N, K), blocks.reshape(N, -1))


class Copies(WeightStore):
    """A WeightStore that packs one weight, and copies its packed arrays for all other weights."""

    def arrays(self, weight, layout):
        if weight.name not in self._arrays:
            first = next(iter(self._arrays.values()), None)
            made = first or layout.make(weight)
            self._arrays[weight.name] = tuple(_aligned_copy(a) for a in made)
        return self._arrays[weight.name]


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Case:
    """A linear layer of one format and shape, ready to run with any number of rows.

    shape: features x values; for a block-diagonal layer (`grouped_linear`) features of all groups x values of one group
    x groups, as "8192x4096x8". table: the backend whose kernels run. times: {rows: seconds of one layer in each run}.
    """

    def __init__(self, format: str, shape: str, max_rows: int, team: Team, table: OpTable) -> None:
        self.N, self.K, *groups = map(int, shape.split("x"))
        self.format, self.shape, self.table, self.groups = format, shape, table, groups
        self.times: dict[int, list[float]] = {}
        part = stored(format, self.N, self.K)
        packed = linear_cpu.CPU[f"linear_{format}"].layout.make(Weight("w", format, (self.N, self.K), (part,)))
        self.weight_bytes = sum(a.nbytes for a in packed)
        self.copies = max(2, -(-CACHES // self.weight_bytes))
        self.executor = self._executor(part, max_rows, team)

    def _executor(self, part: StoredTensor, max_rows: int, team: Team) -> Executor:
        program, sizes = Program(), dict(in_features=self.K, out_features=self.N, width=self.N, column=0)
        declared = partial(GroupedLinear, groups=self.groups[0]) if self.groups else Linear
        width = self.K * (self.groups[0] if self.groups else 1)
        x, out = program.tensor("x", "T", width), program.tensor("out", "T", self.N)
        program.emit(Given(out=x))
        for i in range(self.copies):
            weight = Weight(f"w{i}", self.format, (self.N, self.K), (part,))
            program.emit(declared(out=out, x=x, weight=weight, **sizes))
        backend = {**activations_cpu.CPU, **self.table, "given": Implementation(nothing)}
        executor = Executor(lower(program), backend, team, Copies(), {"T": max_rows}, {}, keep_all=True)
        executor.view(x, max_rows)[...] = np.random.default_rng(1).standard_normal((max_rows, width), np.float32)
        return executor

    def run(self, rows: int) -> None:
        """Runs all copies once, and notes their median time, as other programs may delay some of them."""
        step = StepBlock.made(num_tokens=rows, num_requests=1, num_sampled=1)
        clock = np.zeros(len(self.executor.program.ops), np.int64)
        self.executor.run(step, clock)
        each = np.diff(clock[-1 - self.copies :])
        self.times.setdefault(rows, []).append(float(np.median(each)) / 1e9)

    def seconds(self, rows: int) -> float:
        """The median seconds of one layer, of the runs with this number of rows."""
        return statistics.median(self.times[rows])
