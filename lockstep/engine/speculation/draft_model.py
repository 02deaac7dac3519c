"""A draft model: a smaller model that computes the known tokens of each request and guesses how the request goes on.

It chooses as the target model will, with the noise of the same seed, position and token id, the same temperature,
penalties and biases: where both models find the same token likeliest, they choose the same. It has pages and states of
its own. It computes a part of a prompt in each step, so that no request waits for it; a request whose known tokens are
not all computed gets no drafts.

Keys and values of wrong guesses are overwritten, since they lie by position. Layers with recurrent state have two slots
for each request: known tokens alone change one, and guesses change its copy.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lockstep.engine.cache.pages import PageGroup
from lockstep.engine.model import Model
from lockstep.engine.request import Request
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.sampling import guessed
from lockstep.engine.speculation.draft_memory import DraftMemory, DraftSequence
from lockstep.engine.speculation.drafts import MODEL
from lockstep.engine.speculation.step_costs import GUESS_GAIN, StepCosts
from lockstep.runtime.threads import Team

SLOTS = 2  # of a request, for recurrent layers: one that known tokens change, and one that guesses change
MAX_STEP = 16  # the most known tokens that can be new since a step in which the request had guesses
CATCH_UP = 128  # known tokens that a step may compute beyond the number that the target computes


@contextlib.contextmanager
def named(path: object) -> Iterator[None]:
    """Within it, a ValueError says that it is about the draft model at a path: the target has tensors and config keys
    of the same names."""
    try:
        yield
    except ValueError as error:
        message = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise ValueError(f"speculate: the draft model {message}") from None


def check_vocabulary(target: Model, draft: Model) -> None:
    """ValueError for a draft model with another number of tokens, or without an lm_head."""
    expected, got = target.config.vocab_size, draft.config.vocab_size
    if got != expected:
        raise ValueError(
            f"speculate: the draft model has another vocabulary: {got} tokens, expected {expected} as of the model"
        )
    if not draft.can_generate:
        raise ValueError("speculate: the draft model has no lm_head: it makes embeddings, and no text")


@dataclass(eq=False)
class Guesses:
    """Guesses of a sequence's next tokens. max_guesses: how many are wanted; 0: only the known tokens are to be
    computed. tokens: the guesses made so far."""

    sequence: DraftSequence
    max_guesses: int
    tokens: list[int] = field(default_factory=list)


class DraftModel:
    """Guesses of a smaller model: a `draft_head.Head`.

    limits: the target's. groups: the draft model's own pages, as many as the target's; a request for which they do not
    suffice is dropped. eos_ids: end tokens, after which nothing is guessed. ValueError for another vocabulary than the
    target's."""

    def __init__(
        self,
        model: Model,
        target: Model,
        team: Team,
        limits: Limits,
        groups: tuple[PageGroup, ...],
        eos_ids: frozenset[int],
    ) -> None:
        check_vocabulary(target, model)
        self.model = replace(model, max_context=min(model.max_context, target.max_context))
        self._eos_ids = eos_ids
        states = [c for c in model.recorded.caches if c.kind != "pages"]
        num_slots = limits.max_requests * (SLOTS if states else 1)
        num_tokens = max(limits.max_step_tokens, limits.max_requests)
        own = Limits(num_tokens, num_slots, limits.num_pages, limits.max_requests, groups)
        with named(model.checkpoint.path):
            self.runner = Runner(self.model, team, own)
        self.memory = DraftMemory(groups, limits.max_requests, bool(states))
        self._states = [self.runner.caches[c.name].reshape(-1, c.bytes_each) for c in states]
        self._first_copy = limits.max_requests
        self.sequences: dict[int, DraftSequence] = {}
        self._costs = StepCosts(GUESS_GAIN, GUESS_GAIN)

    name = MODEL

    @property
    def may_rest(self) -> bool:
        """True: nothing that it needs is overwritten by a step of the target."""
        return True

    def wants_hidden(self, request: Request) -> bool:
        """False: it needs token ids only."""
        return False

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """Does nothing."""

    def ready(self, request: Request, max_drafts: int) -> int:
        """`max_drafts`, or 0 for a request that was dropped."""
        sequence = self.sequences.get(request.id)
        return 0 if sequence is not None and sequence.is_dropped else max_drafts

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """{id of a request: guesses of its next tokens}, at most as many as wanted: [(request, max_guesses), ...]. A
        request with max_guesses 0 is computed only, for later guesses.

        num_planned: how many tokens the target computes in this step.
        """
        began = time.perf_counter()
        self._end([sequence for sequence in self.sequences.values() if sequence.request.slot is None])
        if not wanted:
            return {}
        guesses = [Guesses(self._sequence(request, max_guesses), max_guesses) for request, max_guesses in wanted]
        active = [g for g in guesses if not g.sequence.is_dropped]
        has_prompts = any(g.max_guesses == 0 or g.sequence.num_left > MAX_STEP for g in active)
        unfinished, num_steps = self._compute_known(active, CATCH_UP + num_planned), 1
        self._copy_states(unfinished)
        while unfinished:
            unfinished, num_steps = self._go_on(unfinished), num_steps + 1
        if active and not has_prompts:
            self._costs.note(len(active), (time.perf_counter() - began) / num_steps)
        return {g.sequence.request.id: g.tokens for g in guesses}

    def seconds(self, num_requests: int) -> float:
        """Seconds that one more guess for each of num_requests requests takes, with everything around it; 0 before any
        was measured."""
        return self._costs.of(num_requests) if self._costs else 0.0

    def is_behind(self, request: Request) -> bool:
        """Whether the draft model has yet to compute known tokens of a request that it guesses for."""
        sequence = self.sequences.get(request.id)
        return sequence is not None and not sequence.is_dropped and sequence.num_left > 0

    def forget(self, request: Request) -> None:
        """Ends a request's sequence; the request may come again."""
        if request.id in self.sequences:
            self._end([self.sequences[request.id]])

    # ------------------------------------------------------------ memory

    def _sequence(self, request: Request, max_drafts: int) -> DraftSequence:
        """A request's DraftSequence, with pages for its known tokens and guesses; dropped where there is no room."""
        if request.id not in self.sequences:
            self.sequences[request.id] = self.memory.begin(request)
        sequence = self.sequences[request.id]
        if sequence.is_dropped:
            return sequence
        self._keep_right_guesses(sequence)
        end = request.num_tokens + max_drafts
        if end > self.model.max_context or not self.memory.grow(sequence, end):
            self.memory.stop(sequence)  # for good: else the request would begin and stop again and again
        return sequence

    def _keep_right_guesses(self, sequence: DraftSequence) -> None:
        """Counts right guesses as computed known tokens, unless there are recurrent states: guesses change their
        copies.

        The last known token never counts, since its row chooses the next guess.
        """
        last = sequence.request.num_tokens - 1
        known = sequence.request.token_ids(sequence.num_computed, last) if not self._states else []
        pairs = enumerate(zip(known, sequence.guessed, strict=False))
        sequence.num_computed += next((i for i, (a, b) in pairs if a != b), min(len(known), len(sequence.guessed)))
        sequence.guessed = []
        if sequence.num_computed > last:  # the target's step failed, and added no token
            sequence.num_computed = 0 if self._states else last

    def _end(self, sequences: Iterable[DraftSequence]) -> None:
        for sequence in sequences:
            if not sequence.is_dropped:
                self._keep_right_guesses(sequence)
            del self.sequences[sequence.request.id]
            self.memory.end(sequence)

    def _copy_states(self, guesses: Sequence[Guesses]) -> None:
        """Copies the states after the known tokens, from which the guesses go on."""
        for rows in self._states if guesses else ():
            for g in guesses:
                rows[self._copy_of(g.sequence)] = rows[g.sequence.slot]

    def _copy_of(self, sequence: DraftSequence) -> int:
        """The slot whose states guesses change."""
        return sequence.slot + self._first_copy if self._states else sequence.slot

    # ------------------------------------------------------------ steps

    def _compute_known(self, guesses: Sequence[Guesses], budget: int) -> list[Guesses]:
        """Computes known tokens, up to the budget, of the sequences with the fewest left first. A sequence with none
        left gets its first guess; returns the Guesses of which more are wanted."""
        budget, spans, sampled = min(budget, self.runner.limits.max_step_tokens), [], []
        for g in sorted(guesses, key=lambda g: g.sequence.num_left):
            sequence = g.sequence
            count = self._with_pages(g, min(sequence.num_left - (g.max_guesses == 0), budget))
            if count:
                is_sampled, start = count == sequence.num_left, sequence.num_computed
                token_ids = sequence.request.token_ids(start, start + count)
                spans.append(self._span(g, token_ids, start, sequence.slot, is_sampled))
                budget, sequence.num_computed = budget - count, start + count
                sampled += [g] if is_sampled else []
        return self._run(spans, sampled)

    def _with_pages(self, g: Guesses, num_rows: int) -> int:
        """For how many of `num_rows` known tokens there are pages: for fewer than all that are left, if its guesses
        have no pages."""
        sequence = g.sequence
        ahead = g.max_guesses if num_rows == sequence.num_left else 0
        num_tokens = self.memory.extend(sequence, num_rows + ahead)
        return num_rows if num_tokens == num_rows + ahead else max(0, min(num_rows - (ahead > 0), num_tokens))

    def _go_on(self, guesses: Sequence[Guesses]) -> list[Guesses]:
        """Computes the last guess of each; returns the Guesses of which more are wanted."""
        spans = []
        for g in guesses:
            token, at = g.tokens[-1], g.sequence.request.num_tokens + len(g.tokens) - 1
            spans.append(self._span(g, [token], at, self._copy_of(g.sequence), True))
            g.sequence.guessed.append(token)
        return self._run(spans, guesses)

    def _span(self, g: Guesses, token_ids: list[int], start: int, slot: int, is_sampled: bool) -> Span:
        """The Span of tokens of a request. is_sampled: whether the last row chooses the next token."""
        request, vocab_size = g.sequence.request, self.model.config.vocab_size
        sampled = {len(token_ids) - 1: guessed(request, self._eos_ids, vocab_size, g.tokens)} if is_sampled else {}
        return Span(token_ids, start, g.sequence.pages, slot, sampled)

    def _run(self, spans: list[Span], sampled: Sequence[Guesses]) -> list[Guesses]:
        """Runs a step, if there are spans. sampled: the Guesses that get a token, in the order of their spans. Returns
        the Guesses of which more are wanted."""
        if not spans:
            return []
        tokens, logprobs, _ = self.runner.step(spans)
        rows = zip(sampled, tokens[: len(sampled)].tolist(), logprobs[: len(sampled)].tolist(), strict=True)
        return [g for g, token, logprob in rows if self._take_guess(g, token, logprob)]

    def _take_guess(self, g: Guesses, token: int, logprob: float) -> bool:
        """Takes in a guess; returns whether another one is wanted. A NaN or an infinity drops the sequence: the
        target's answer does not depend on it."""
        p = g.sequence.request.params
        if not math.isfinite(logprob):
            self.memory.stop(g.sequence)
            return False
        if token in p.stop_token_ids or (token in self._eos_ids and not p.ignore_eos):
            return False
        g.tokens.append(token)
        return len(g.tokens) < g.max_guesses
