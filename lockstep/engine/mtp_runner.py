"""Runs a model's MTP head: all drafts of a step, of all requests, in one native call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.engine.model import Model
from lockstep.engine.runner import Limits
from lockstep.ops.kv_cache import PAGE_TOKENS
from lockstep.ops.sample import SAMPLING_RECORD, Sample
from lockstep.runtime.backend import OpTable
from lockstep.runtime.executor import ALIGNMENT, Chain, Executor, aligned
from lockstep.runtime.kernel import OnCompile
from lockstep.runtime.program import Program
from lockstep.runtime.step_block import StepBlock
from lockstep.runtime.threads import Team

LINE = ALIGNMENT // 4  # numbers in a cache line


@dataclass
class Chase:
    """Pairs of one request: tokens that lie at positions start, ... of its pages, and the hidden states before them.

    token_ids: n tokens. hidden: float32 [m, D], m <= n, of the last m; the others have zeros. pages: page ids, of which
    the first holds position 0 (the head knows positions only by their distance, so that a request's first pages may be
    left out). depth: how many drafts follow the last token. sampling: fields of the first one's SAMPLING_RECORD, each
    later one's the same but for its position, and without a mask.
    """

    token_ids: list[int]
    start: int
    hidden: np.ndarray
    pages: list[int]
    depth: int = 0
    sampling: dict[str, Any] | None = None


class MtpRunner:
    """An MTP head bound to memory and threads. Everything is allocated here.

    program: the head's, as the backend runs it. num_drafts: the most of one request in a step.
    """

    def __init__(
        self,
        model: Model,
        program: Program,
        backend: OpTable,
        team: Team,
        limits: Limits,
        num_drafts: int,
        on_compile: OnCompile | None = None,
    ) -> None:
        self.program, S, K = program, limits.max_requests, num_drafts
        self.max_rows = limits.max_step_tokens + S * (PAGE_TOKENS + 1)
        self._sources = self.program.sources()
        self.caches = {c.name: aligned(c.bytes_each * limits.num_pages) for c in self.program.caches}
        D = model.config.hidden_size
        [given], hidden = self.program.given, self.program.results["hidden"]
        [sample] = [op for op in self.program.ops if isinstance(op, Sample)]
        self._given = _rows(self.max_rows, D)
        self._hidden = [_rows(S, D) for _ in range(K)]
        line = -(-S // LINE) * LINE + LINE  # of each depth, so that kernels may go past the end of a row
        self._tokens, self._logprobs = _rows(K, line).view(np.int32), _rows(K, line)
        self._sampling = np.zeros((K, S), SAMPLING_RECORD)
        self._position, self._context_len = np.zeros((2, K, S), np.int32)
        caches, pages = {name: a.ctypes.data for name, a in self.caches.items()}, -(-model.max_context // PAGE_TOKENS)
        executors, self._arrays, self._steps = [], [], []
        for depth in range(K):
            rows = {"T": S if depth else self.max_rows, "O": S, "R": S, "E": 0, "S": S}
            elsewhere = {
                given: (self._hidden[depth - 1] if depth else self._given).ctypes.data,
                hidden: self._hidden[depth].ctypes.data,
                sample.token: self._tokens[depth].ctypes.data,
                sample.logprob: self._logprobs[depth].ctypes.data,
            }
            executors.append(
                Executor(
                    self.program, backend, team, model.store, rows, caches, elsewhere=elsewhere, on_compile=on_compile
                )
            )
            self._allocate(rows, pages)
        self._chain = Chain(executors, self._steps)

    def _allocate(self, rows: dict[str, int], pages: int) -> None:
        """The step block and arrays of the next depth. Those after the first read the tokens of the one before, one of
        each request, on the same pages."""
        depth = len(self._arrays)
        shapes = StepBlock.shapes(**rows, P=pages)
        del shapes["sampling"]
        a = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
        a["sampling"] = self._sampling[depth]
        if depth:
            count = np.arange(rows["S"], dtype=np.int32)
            a["request"][:] = a["output_row"][:] = a["sampled_row"][:] = count
            a["query_start"][1:] = count + 1
            a["position"], a["context_len"] = self._position[depth], self._context_len[depth]
            a["token_ids"], a["page_table"] = self._tokens[depth - 1], self._arrays[0]["page_table"]
        self._arrays.append(a)
        self._steps.append(StepBlock.made(**a, pages_per_request=pages))

    def run(self, chases: Sequence[Chase]) -> list[list[int]]:
        """Takes in the pairs of all requests; returns the drafts of each, fewer where the head gives no numbers.

        Those that draft must come first, the most drafts first.
        """
        depths = [chase.depth for chase in chases]
        assert depths == sorted(depths, reverse=True), depths
        self._fill(chases)
        deepest = max(depths)
        for depth in range(1, deepest):
            count = sum(d > depth for d in depths)
            counts = dict.fromkeys(("num_tokens", "num_requests", "num_sampled", "num_outputs"), count)
            StepBlock.write(self._steps[depth], **counts)
        self._chain.run(max(1, deepest))
        return [self._taken(s, depth) for s, depth in enumerate(depths)]

    def _taken(self, row: int, depth: int) -> list[int]:
        """The drafts of a row, up to the first that is no choice."""
        logprobs = self._logprobs[:depth, row].tolist()
        count = next((i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob)), depth)
        return self._tokens[:count, row].tolist()

    def _fill(self, chases: Sequence[Chase]) -> None:
        """Writes the step blocks of all depths."""
        a, at, longest, sampled = self._arrays[0], 0, 0, 0
        for s, chase in enumerate(chases):
            n, end = len(chase.token_ids), chase.start + len(chase.token_ids)
            rows = slice(at, at + n)
            at += n
            longest = max(longest, end + chase.depth)
            a["token_ids"][rows] = chase.token_ids
            a["position"][rows] = np.arange(chase.start, end)
            a["request"][rows] = s
            a["context_len"][s], a["query_start"][s + 1] = end, at
            a["page_table"][s, : len(chase.pages)] = chase.pages
            self._given[rows.start : at - len(chase.hidden)] = 0
            self._given[at - len(chase.hidden) : at] = chase.hidden
            if chase.depth:
                a["output_row"][s] = at - 1
                a["sampled_row"][s] = s
                self._fill_sampling(s, chase, end)
                sampled += 1
        for source in self._sources:
            source.cover(longest)
        counts = dict(num_tokens=at, num_requests=len(chases), num_sampled=sampled, num_outputs=sampled)
        StepBlock.write(self._steps[0], **counts)

    def _fill_sampling(self, row: int, chase: Chase, end: int) -> None:
        """How each draft of a request is chosen, and where the ones after the first lie."""
        record, depths = np.zeros(1, SAMPLING_RECORD), np.arange(chase.depth)
        for name, value in (chase.sampling or {}).items():
            record[name] = value
        rows = self._sampling[: chase.depth, row]
        rows[:] = record
        rows["position"] += depths
        rows["mask"][1:] = 0  # it is that of the first
        self._position[: chase.depth, row], self._context_len[: chase.depth, row] = end + depths - 1, end + depths


def _rows(count: int, width: int) -> np.ndarray:
    """Zeroed float32 [count, width], and a cache line after it."""
    size = 4 * count * width
    return aligned(size + ALIGNMENT)[:size].view(np.float32).reshape(count, width)
