"""What an engine compiles and packs before it starts: known at once, so that progress has a total."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lockstep.engine.model import Model
from lockstep.engine.selfcheck import check as selfcheck
from lockstep.native.compile import compile_kernels
from lockstep.native.kernel import Kernel
from lockstep.ops.rewrite import fuse, lower
from lockstep.progress import OnProgress
from lockstep.runtime.backend import Layout, OpTable
from lockstep.runtime.program import Program, Weight
from lockstep.weights.store import WeightStore


class Runnable(NamedTuple):
    """A program, the op table that runs it, and the store of its weights."""

    program: Program
    table: OpTable
    store: WeightStore

    def weights(self) -> Iterator[tuple[Weight, Layout]]:
        """Each weight that an op reads, in the layout in which its kernel reads it; some several times."""
        for op in self.program.ops:
            implementation = self.table.get(op.kind)
            if implementation is None:
                continue  # the Executor says which
            for word in op.words():
                value = getattr(op, word.name)
                if isinstance(value, Weight):
                    layout = implementation.layouts.get(word.name, implementation.layout)
                    yield value.whole or value, layout


def prepare(
    program: Program, table: OpTable, model: Model, draft: Model | None, speculate: str, progress: OnProgress | None
) -> None:
    """Compiles the kernels of a model's program, of what drafts for it and of their self-checks, all at once, and tells
    the stores which weights they are to pack.

    draft: the draft model; speculate: see EngineOptions. progress: called with ("compiling", number of kernels that are
    done, number of all that have to be compiled).
    """
    runnables = [Runnable(program, table, model.store)]
    if draft is not None:
        own = draft.backend()
        runnables.append(Runnable(draft.rewritten(own), own, draft.store))
    elif model.drafts_by_mtp(speculate):
        runnables.append(Runnable(fuse(lower(model.recorded_mtp), table), table, model.store))
    compile_missing(itertools.chain(*map(needed_kernels, runnables)), progress)
    for runnable in runnables:
        runnable.store.expect(runnable.weights())


def needed_kernels(runnable: Runnable) -> list[Kernel]:
    """The kernels of a program and, unless it has passed already, of its self-check."""
    program, table, _ = runnable
    if any(op.kind not in table for op in program.ops):
        return []  # the Executor says which
    programs = [program, *selfcheck.programs(program, table)]
    return [table[op.kind].kernel for each in programs for op in each.ops if op.kind in table]


def compile_missing(kernels: Iterable[Kernel], progress: OnProgress | None) -> None:
    """Compiles those kernels that are not in the cache. progress: see `prepare`."""
    missing = [kernel for kernel in dict.fromkeys(kernels) if not kernel.is_cached]
    if progress is None or not missing:
        return compile_kernels(missing)
    begun = itertools.count()
    compile_kernels(missing, lambda _: progress("compiling", next(begun), len(missing)))
    progress("compiling", len(missing), len(missing))
