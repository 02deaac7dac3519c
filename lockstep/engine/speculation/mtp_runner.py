"""Runs a model's MTP head: all drafts of a step, of all requests, in one native call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.engine.cache.pages import Held, pages_for
from lockstep.engine.model import Model
from lockstep.engine.runner import Limits
from lockstep.engine.step_arrays import StepArrays, records_view, write_record
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.ops.sampling.sample import SAMPLING_RECORD, Sample
from lockstep.runtime.backend import OpTable
from lockstep.runtime.executor import ALIGNMENT, Chain, Executor, aligned
from lockstep.runtime.program import Program
from lockstep.runtime.threads import Team

KEPT_PAIRS = 16  # the most pairs of a request that wait until drafts are wanted
LINE = ALIGNMENT // 4  # numbers in a cache line


@dataclass
class PairSpan:
    """Pairs of one request in a call: each is a token and the hidden state of the token before it.

    token_ids: n tokens, at positions start, start + 1, ... hidden: float32 [m, D], m <= n: those of the last m pairs;
    the first n - m have zeros. pages: the first holds position 0 (only distances between positions matter to the head,
    so that a request's first pages may be left out). depth: how many drafts follow the last token. sampling: fields of
    the first draft's SAMPLING_RECORD; each later draft has the same fields but for its position, and no mask.
    """

    token_ids: list[int]
    start: int
    hidden: np.ndarray
    pages: list[Held]
    depth: int = 0
    sampling: dict[str, Any] | None = None


class MtpRunner:
    """An MTP head bound to memory and threads. Everything is allocated here.

    program: the head's, as the backend runs it. num_drafts: the most drafts of a request in a step.
    """

    def __init__(
        self,
        model: Model,
        program: Program,
        backend: OpTable,
        team: Team,
        limits: Limits,
        num_drafts: int,
    ) -> None:
        self.program, S, K = program, limits.max_requests, num_drafts
        self.max_rows = limits.max_step_tokens + S * (PAGE_TOKENS + 1 + KEPT_PAIRS)
        self._sources = self.program.sources()
        self.caches = {c.name: aligned(c.bytes_each * limits.num_pages) for c in self.program.caches}
        D = model.config.hidden_size
        [given], hidden = self.program.given, self.program.results["hidden"]
        [sample] = [op for op in self.program.ops if isinstance(op, Sample)]
        self._given = _rows(self.max_rows, D)
        self._hidden = [_rows(S, D) for _ in range(K)]
        line = -(-S // LINE) * LINE + LINE  # numbers of each depth: kernels may go past the end of a row
        self._tokens, self._logprobs = _rows(K, line).view(np.int32), _rows(K, line)
        self._sampling, self._num_requests = np.zeros((K, S), SAMPLING_RECORD), S
        self._position, self._context_len = np.zeros((2, K, S), np.int32)
        self._records, self._positions, self._context_lens = (
            records_view(self._sampling),
            self._position.reshape(-1).data,
            self._context_len.reshape(-1).data,
        )
        caches, pages = {name: a.ctypes.data for name, a in self.caches.items()}, pages_for(model.max_context)
        executors: list[Executor] = []
        self._steps: list[StepArrays] = []
        for depth in range(K):
            rows = {"T": S if depth else self.max_rows, "O": S, "R": S, "E": 0, "S": S}
            elsewhere = {
                given: (self._hidden[depth - 1] if depth else self._given).ctypes.data,
                hidden: self._hidden[depth].ctypes.data,
                sample.token: self._tokens[depth].ctypes.data,
                sample.logprob: self._logprobs[depth].ctypes.data,
            }
            executors.append(Executor(self.program, backend, team, model.store, rows, caches, elsewhere=elsewhere))
            self._steps.append(StepArrays(rows, pages, given=self._given_to(depth, rows["S"])))
        self._layout: list[tuple[int, int]] = []  # of the last call: the number of pairs and drafts of each request
        self._chain = Chain(executors, [step.block for step in self._steps])

    def _given_to(self, depth: int, count: int) -> dict[str, np.ndarray]:
        """Arrays of a depth's step block that are shared with others. Each depth after the first reads one token of
        each request, the draft of the depth before, on the same pages."""
        records = {"sampling": self._sampling[depth]}
        if not depth:
            return records
        rows, first = np.arange(count, dtype=np.int32), self._steps[0].arrays
        one_row = dict(
            request=rows, output_row=rows, sampled_row=rows, query_start=np.arange(count + 1, dtype=np.int32)
        )
        places = dict(position=self._position[depth], context_len=self._context_len[depth])
        return records | one_row | places | dict(token_ids=self._tokens[depth - 1], page_table=first["page_table"])

    def run(self, spans: Sequence[PairSpan]) -> list[list[int]]:
        """Computes the pairs of all requests; returns the drafts of each, fewer where the head's logits are not finite.

        Spans must be ordered by depth, the deepest first.
        """
        layout = [(len(span.token_ids), span.depth) for span in spans]
        if layout != self._layout:  # while requests decode, the layout often stays the same
            self._lay_out([span.depth for span in spans])
            self._steps[0].lay_out([len(span.token_ids) for span in spans])
            self._layout = layout
        self._fill(spans)
        self._chain.run(max(1, spans[0].depth))
        return [self._taken(s, span.depth) for s, span in enumerate(spans)]

    def _lay_out(self, depths: list[int]) -> None:
        """Writes the number of requests of each depth's step. depths: how many drafts of each request are wanted."""
        assert depths == sorted(depths, reverse=True), depths
        sampled = sum(depth > 0 for depth in depths)
        self._steps[0].set_counts(num_sampled=sampled, num_outputs=sampled)
        for depth in range(1, depths[0]):
            count = sum(d > depth for d in depths)
            self._steps[depth].set_counts(num_tokens=count, num_requests=count, num_sampled=count, num_outputs=count)

    def _taken(self, row: int, depth: int) -> list[int]:
        """The drafts of a request, up to the first whose log-probability is not finite."""
        logprobs = self._logprobs[:depth, row].tolist()
        count = next((i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob)), depth)
        return self._tokens[:count, row].tolist()

    def _fill(self, spans: Sequence[PairSpan]) -> None:
        """Writes the step blocks of all depths."""
        step, at, longest = self._steps[0], 0, 0
        for s, span in enumerate(spans):
            end = span.start + len(span.token_ids)
            longest = max(longest, end + span.depth)
            step.set_tokens(s, at, span.token_ids, span.start)
            step.set_pages(s, span.pages)
            known = at + len(span.token_ids) - len(span.hidden)
            if known > at:
                self._given[at:known] = 0
            at += len(span.token_ids)
            self._given[known:at] = span.hidden
            if span.depth:
                step.ints["output_row"][s], step.ints["sampled_row"][s] = at - 1, s
                self._fill_sampling(s, span, end)
        for source in self._sources:
            source.cover(longest)

    def _fill_sampling(self, row: int, span: PairSpan, end: int) -> None:
        """Writes the SAMPLING_RECORD of each draft of a request, and the positions of the drafts."""
        fields = dict(span.sampling or {})
        position = fields.get("position", 0)
        for depth in range(span.depth):
            fields["position"], at = position + depth, depth * self._num_requests + row
            write_record(self._records, at, fields)
            self._positions[at], self._context_lens[at] = end + depth - 1, end + depth
            fields["mask"] = 0  # the mask is that of the first draft only


def _rows(count: int, width: int) -> np.ndarray:
    """Zeroed float32 [count, width] in aligned memory, with a cache line after it."""
    size = 4 * count * width
    return aligned(size + ALIGNMENT)[:size].view(np.float32).reshape(count, width)
