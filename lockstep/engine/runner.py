"""Runs steps of a model: cache memory, the step block, and the executor. Knows nothing of requests or schedules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lockstep.engine.cache.pages import Held, PageGroup
from lockstep.engine.step_arrays import StepArrays, write
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.ops.rewrite import verifying
from lockstep.ops.sampling.sample import Sample
from lockstep.runtime.backend import OpTable
from lockstep.runtime.executor import Executor, aligned
from lockstep.runtime.program import CacheArray, Program, Tensor
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore


@dataclass
class Span:
    """The tokens of one request in a step: positions start .. start + len(token_ids).

    pages: the pages that the request holds, one Held for each group of pages (`Program.windows`); a single Held stands
    for all groups. slot: of its recurrent state. sampled: the rows that sample, {row: fields of a SAMPLING_RECORD},
    rows counted from the span's first token. embedded: rows whose last hidden state is wanted. num_drafts: how many of
    the last token_ids are drafts. num_pending: how many drafts of the request's last step were right, and so are known
    tokens before `start`, which its recurrent layers have yet to absorb: see `ops.recurrent.gated_delta_verify`."""

    token_ids: list[int]
    start: int
    pages: list[Held]
    slot: int
    sampled: dict[int, dict[str, Any]] = field(default_factory=dict)
    embedded: Sequence[int] = ()
    num_drafts: int = 0
    num_pending: int = 0


@dataclass(frozen=True)
class Limits:
    """The largest step (tokens, requests, sampled rows), and the pages of KV cache of layers without a window.

    groups: the pages of each group; empty: every group has num_pages, and no window. num_spare: of the requests, how
    many can only be such as another engine began.
    """

    max_step_tokens: int = 512
    max_requests: int = 8
    num_pages: int = 64
    max_sampled: int = 8
    groups: tuple[PageGroup, ...] = ()
    num_spare: int = 0


class Runnable(Protocol):
    """What a Runner needs of a model."""

    @property
    def store(self) -> WeightStore:
        """The model's packed weights."""
        ...

    @property
    def max_context(self) -> int:
        """The most positions of a request."""
        ...

    def backend(self, swaps: Mapping[str, str] | None, base: str) -> OpTable:
        """The op table of the backend `base`, with swaps."""
        ...

    def rewritten(self, backend: OpTable, fused: bool) -> Program:
        """The program, lowered for a backend, and fused if it is to be."""
        ...


class Runner:
    """A model bound to memory and threads. Everything is allocated here; `step` allocates nothing native.

    swaps, base: see `Model.backend`. keep, elsewhere: see `Executor`. num_drafts: the most drafts of a request in a
    step. prepare: called with the program and its op table before kernels are compiled and weights packed. sample: the
    Sample op of the program; tests read its operands after a step.
    """

    def __init__(
        self,
        model: Runnable,
        team: Team,
        limits: Limits,
        swaps: Mapping[str, str] | None = None,
        base: str = "cpu",
        *,
        keep: bool = False,
        fused: bool = True,
        num_drafts: int = 0,
        elsewhere: dict[Tensor, int] | None = None,
        prepare: Callable[[Program, OpTable], None] | None = None,
    ) -> None:
        self.model, self.limits, self.team = model, limits, team
        backend = model.backend(swaps, base)
        program = model.rewritten(backend, fused)
        self.program = verifying(program, num_drafts) if num_drafts else program
        if prepare is not None:
            prepare(self.program, backend)
        self.caches = {c.name: aligned(c.bytes_each * self._count(c)) for c in self.program.caches}
        T = limits.max_step_tokens
        rows = {"T": T, "O": T, "R": limits.max_sampled, "E": T, "S": limits.max_requests}
        addresses = {name: array.ctypes.data for name, array in self.caches.items()}
        self._sources = self.program.sources()
        self.executor = Executor(
            self.program,
            backend,
            team,
            model.store,
            rows,
            addresses,
            keep_all=keep,
            elsewhere=elsewhere,
        )
        self._step = StepArrays(rows, -(-model.max_context // PAGE_TOKENS), max(1, len(self.program.windows())))
        [self.sample] = [op for op in self.program.ops if isinstance(op, Sample)]
        self._make_views(rows)
        self._layout: list[
            tuple
        ] = []  # of the last step: of each request the number of rows, embedded and sampled rows
        self._num_sampled = 0  # of the last step

    def _count(self, cache: CacheArray) -> int:
        """How many pages or slots a cache has."""
        if cache.kind != "pages":
            return self.limits.max_requests
        return self.limits.groups[cache.group].num_pages if self.limits.groups else self.limits.num_pages

    def _make_views(self, rows: dict[str, int]) -> None:
        """Makes the views of tensors whose first rows `step` and `hidden` return."""
        token, logprob, logits = (
            self.executor.view(tensor, rows["R"])
            for tensor in (self.sample.token, self.sample.logprob, self.sample.logits)
        )
        self._sampled = token[:, 0], logprob[:, 0], logits[:, : self.sample.vocab_size]
        hidden = self.program.results.get("hidden")
        self._hidden = None if hidden is None else self.executor.view(hidden, rows["E"])

    def step(self, spans: Sequence[Span], clock: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs one step. Returns (tokens int32 [R], logprobs float32 [R], logits float32 [R, V]).

        R are the sampled rows, in the order of the spans and of the rows within each. The arrays are views that the
        next step overwrites. clock: see `Executor.run`.
        """
        num_sampled = self._fill(spans)
        self.executor.run(self._step.block, clock)
        token, logprob, logits = self._sampled
        return token[:num_sampled], logprob[:num_sampled], logits[:num_sampled]

    def prepare(self, spans: Sequence[Span]) -> np.ndarray:
        """The step block of a step, for callers that run single ops of it; the next step overwrites it."""
        self._fill(spans)
        return self._step.block

    def alternatives(self, row: int, num_alternatives: int) -> dict[int, float]:
        """The `num_alternatives` likeliest tokens of a sampled row of the last step, {token id: log-probability}. The
        row's num_logprobs must have been at least `num_alternatives`."""
        num_alternatives, tensors = (
            min(num_alternatives, self.sample.vocab_size),
            (self.sample.top_token, self.sample.top_logprob),
        )
        ids, logprobs = (self.executor.view(tensor, row + 1)[row, :num_alternatives] for tensor in tensors)
        return dict(zip(ids.tolist(), logprobs.tolist(), strict=True))

    def hidden(self, first: int, num_rows: int) -> np.ndarray:
        """Last hidden states, after the final norm, of the embedded rows first .. first + count of the last step:
        float32 [count, D], a view."""
        assert self._hidden is not None, "the program has no result 'hidden'"
        return self._hidden[first : first + num_rows]

    def is_adjusted(self, row: int) -> bool:
        """Whether a sampled row of the last step changed its logits before a token was chosen."""
        return bool(self._step.records["adjustment"][row])

    def is_forbidden(self, row: int, token: int) -> bool:
        """Whether a sampled row of the last step forbids a token; one is chosen only where every token is forbidden."""
        adjusted = self._step.records["adjustment"][row] != 0
        return bool(adjusted and np.isneginf(self.executor.view(self.sample.adjusted, row + 1)[row, token]))

    def _fill(self, spans: Sequence[Span]) -> int:
        """Writes the spans into the step block; returns the number of sampled rows."""
        layout = [(len(span.token_ids), span.embedded, *span.sampled) for span in spans]
        if layout != self._layout:  # while requests decode, the layout stays the same
            self._num_sampled, self._layout = self._lay_out(spans), layout
        step, at, row, longest = self._step, 0, 0, 0
        slot, num_drafts, num_pending = (step.ints[name] for name in ("state_slot", "num_drafts", "num_pending"))
        for s, span in enumerate(spans):
            step.set_tokens(s, at, span.token_ids, span.start)
            step.set_pages(s, span.pages)
            slot[s], num_drafts[s], num_pending[s] = span.slot, span.num_drafts, span.num_pending
            for fields in span.sampled.values():
                step.set_record(row, fields)
                row += 1
            at += len(span.token_ids)
            longest = max(longest, span.start + len(span.token_ids))
        for source in self._sources:
            source.cover(longest)
        return self._num_sampled

    def _lay_out(self, spans: Sequence[Span]) -> int:
        """Writes which rows belong to which request, and which have an output; returns the number of sampled rows."""
        step, at, row, output, embedded = self._step, 0, 0, 0, 0
        step.lay_out([len(span.token_ids) for span in spans])
        for span in spans:
            offsets = sorted({*span.sampled, *span.embedded})
            output_of = dict(zip(offsets, range(output, output + len(offsets)), strict=True))
            write(step.ints["output_row"], output, [at + offset for offset in offsets])
            write(step.ints["sampled_row"], row, [output_of[offset] for offset in span.sampled])
            write(step.ints["embedded_row"], embedded, [output_of[offset] for offset in span.embedded])
            at, output = at + len(span.token_ids), output + len(offsets)
            row, embedded = row + len(span.sampled), embedded + len(span.embedded)
        step.set_counts(num_sampled=row, num_embedded=embedded, num_outputs=output)
        return row
