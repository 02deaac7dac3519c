"""Drafts: guesses of the next tokens, computed in the same step as the token before them, and kept if they are right.

A draft changes nothing but the time. It takes tokens, sampled rows and pages of a step that are left over, so that
nobody waits, is preempted or loses a cached block for it. A draft is right if the model, with the noise of its position
and with what the request asks of its logits, chooses the same token. Of a wrong one nothing is left to undo: keys and
values past the computed tokens of a request are overwritten before anybody reads them.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lockstep.engine.draft_width import FORCED, Acceptance, Guesser, WidthChoice, best_width
from lockstep.engine.earlier_answers import EarlierAnswers
from lockstep.engine.lookup import Guess, Lookup
from lockstep.engine.request import Request
from lockstep.engine.sampling import num_rows
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.speculative_mask import SpeculativeMask
from lockstep.engine.step_costs import StepCosts

MAX_DRAFTS, MOST_BY_ITSELF = 15, 7  # of a request in a step: that may be asked for; where the width follows what pays
ROUNDS = 4  # of asking for drafts that follow other drafts
NOTHING = Guess([], "")
DOUBTED = 0.99  # of the time that a head takes, for each step in which it was not asked


@dataclass
class Spare:
    """What a step has left: tokens, and rows that sample; how many rows and new tokens it has already, what rows cost,
    and how many drafts each request may have, by its id, where as many are made as pay."""

    tokens: int
    rows: int
    num_rows: int
    num_new: float
    costs: StepCosts
    widths: dict[int, tuple[int, int]] | None = None  # that pay, by request: of texts, and of the head


@dataclass(slots=True)
class Drafts:
    """Guessed tokens of a request, in order, and where each comes from."""

    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, guess: Guess) -> None:
        """Takes in what may follow them."""
        self.tokens += guess.tokens
        self.sources += [guess.source] * len(guess.tokens)

    def cut(self, count: int) -> None:
        """Keeps the first `count`."""
        del self.tokens[count:], self.sources[count:]


# (request, at most how many, drafts of its next tokens): what may follow the drafts
Source = Callable[[Request, int, Sequence[int]], Guess]


def look_up(request: Request, most: int, drafts: Sequence[int]) -> Guess:
    """What followed the same few tokens in the texts that a request looks in."""
    assert request.lookup is not None, "the Drafter makes it"
    request.lookup.extend(request.token_ids(len(request.lookup), request.num_tokens))
    return request.lookup.guess(most, drafts)


class Head(Protocol):
    """A model that guesses, for all requests of a step together. name: what its drafts are counted under."""

    name: str

    @property
    def may_rest(self) -> bool:
        """Whether `guess` need not be called in this step if nothing is wanted."""
        ...

    def wants_hidden(self, request: Request) -> bool:
        """Whether `observe` is to be told the hidden states of a request's tokens."""
        ...

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """After a step: takes in the last hidden states of a request's tokens from position `start` on, float32 [n, D];
        they are overwritten by the next step."""
        ...

    def ready(self, request: Request, most: int) -> int:
        """How many drafts a request may have, up to `most`."""
        ...

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """Before every step: {id of a request: guesses of its next tokens}, for each at most as many as wanted; 0: it
        has yet to be read. num_planned: tokens that the model computes in this step."""
        ...

    def is_behind(self, request: Request) -> bool:
        """Whether a request has yet to be read, so that it got no guess."""
        ...

    def seconds(self, num_requests: int) -> float:
        """Seconds that one more guess for each of so many requests takes; 0 before any was measured."""
        ...

    def forget(self, request: Request) -> None:
        """Gives back what a request has here; it may come again."""
        ...


# of texts, by what the option `speculate` says; None: texts are not looked in
SOURCES: dict[str, Source | None] = {"off": None, "auto": look_up, "mtp": None, "lookup": look_up}
MODEL = "model"  # what it says where a smaller model drafts


def may_draft(request: Request) -> bool:
    """Whether a request may have drafts when it decodes: not one that makes no tokens, nor one with a mask that cannot
    be asked about tokens that may not come."""
    mask = request.params.logits_mask
    return request.pool is None and (mask is None or isinstance(mask, SpeculativeMask))


class DraftCounts:
    """How many drafts from one source were computed, and how many were right, by depth."""

    def __init__(self) -> None:
        self.drafted, self.right = [0] * MAX_DRAFTS, [0] * MAX_DRAFTS


class Drafter:
    """Gives the requests of a step their drafts.

    source: of texts, or None. num_drafts: of one request in a step; None: as many as pay. eos_ids: the model's end
    tokens, after which nothing is drafted. head: a model that guesses where texts do not guess better. counts: {source:
    DraftCounts}. rests: whether this step is like those before it, in which no draft was worth its row; it need not be
    timed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        source: Source | None,
        num_drafts: int | None,
        eos_ids: frozenset[int],
        head: Head | None = None,
    ) -> None:
        self._scheduler, self._source, self._eos_ids, self.head = scheduler, source, eos_ids, head
        self._seconds_guessing = 0.0  # of this step, by the head
        self._since_asked = 0  # steps since it guessed
        # of this step, where it guesses and texts had a guess, too: that one, and after how many tokens of the answer
        self._passed_over: dict[Request, tuple[Drafts, int]] = {}
        self._is_fixed, self._num_drafts = num_drafts is not None, num_drafts or MOST_BY_ITSELF
        self._choice = WidthChoice(self._num_drafts, follows=head is not None)
        self._answers = EarlierAnswers()
        self.rests = False
        self.counts: dict[str, DraftCounts] = {}

    def draft(self, plan: list[tuple[Request, int]]) -> dict[Request, Drafts]:
        """Drafts of the next tokens of requests of a step, with pages to put them in, from what the step has left.

        Only for requests that decode and may have drafts.
        """
        decoding = [request for request, _ in plan if request.num_left == 1]
        self._passed_over, self.rests = {}, self._rests(decoding, len(plan))
        if self.rests:
            self._since_asked += 1
            return {}
        spare, made, asked = self._spare(plan, decoding), {}, []
        for request, _ in plan:
            if not may_draft(request):
                continue
            if request.num_left > 1:
                if self.head and self._is_read(request):
                    asked.append((request, 0))
            elif spare:
                made[request], count = self._planned(request, spare)
                asked += [(request, count)] if count else []
        if self.head:
            self._ask(self.head, asked, made, sum(count for _, count in plan))
        return made

    def _rests(self, decoding: list[Request], num_planned: int) -> bool:
        """Whether this step is like those before it, in which no draft was worth its row."""
        if self._is_fixed or any(request.params.logits_mask for request in decoding):
            return False
        if self.head and (len(decoding) < num_planned or not self.head.may_rest):
            return False
        return self._choice.rests(len(decoding))

    def _spare(self, plan: list[tuple[Request, int]], decoding: list[Request]) -> Spare | None:
        """What is left in a step of so many tokens of each request; None if nobody is to draft."""
        rows = len(decoding)  # a prompt's step costs what it costs: drafts are weighed as if it were not there
        widths = None
        if not self._is_fixed:
            able = [request for request in decoding if may_draft(request)]
            found = self._choice.choose([self._seen(request) for request in able], rows, self._guesser(len(plan)))
            if not any(map(any, found)) and not any(request.params.logits_mask for request in able):
                return None
            widths = {request.id: both for request, both in zip(able, zip(*found, strict=True), strict=True)}
        limits, tokens = self._scheduler.limits, sum(count for _, count in plan)
        sampled = sum(num_rows(request, count) for request, count in plan)
        left = limits.max_step_tokens - tokens, limits.max_sampled - sampled
        return Spare(*left, rows, rows, self._choice.costs(rows), widths)

    def _guesser(self, num_requests: int) -> Guesser | None:
        """What choosing widths takes from the head; a measured time that keeps it from being asked is doubted more and
        more."""
        if self.head is None:
            return None
        seconds = self.head.seconds(num_requests) * DOUBTED**self._since_asked
        return Guesser(self.head.name, seconds, self._source is not None)

    def _planned(self, request: Request, spare: Spare) -> tuple[Drafts, int]:
        """A request's drafts from its grammar and from texts, or how many the head is asked for; they are taken from
        what is spare."""
        room, (paying, of_head) = self._room(request, spare), self._most(request, spare)
        forces = request.params.logits_mask is not None  # and what it forces is right
        drafts, asked = self._guessed(request, room, paying) if paying or (room and forces) else Drafts(), 0
        if self.head and of_head and self._is_better(self.head, request, drafts):
            asked = self.head.ready(request, of_head)
        if asked:
            self._passed_over[request], drafts = (drafts, len(request.output_ids)), Drafts()
        drafts.cut(self._width(request, drafts, paying, spare))
        count = asked or len(drafts)
        count = self._scheduler.lend(request, count) if count else 0
        spare.tokens, spare.rows, spare.num_rows = spare.tokens - count, spare.rows - count, spare.num_rows + count
        drafts.cut(count)
        return drafts, min(asked, count)

    def _is_better(self, head: Head, request: Request, drafts: Drafts) -> bool:
        """Whether a head may guess better than what there is."""
        if not drafts:
            return True
        first, seen = drafts.sources[0], self._seen(request)
        return first != FORCED and seen.of(head.name)[0] > seen.of(first)[0]

    def _ask(self, head: Head, asked: list[tuple[Request, int]], made: dict[Request, Drafts], num_planned: int) -> None:
        """Adds what the head guesses."""
        began = time.perf_counter()
        found = head.guess(asked, num_planned)
        self._seconds_guessing = time.perf_counter() - began
        self._since_asked = 0 if any(count for _, count in asked) else self._since_asked + 1
        for request, count in asked:
            if count:
                if head.is_behind(request):
                    self._choice.try_again(self._seen(request))
                with contextlib.suppress(ValueError):  # a limit of the grammar, as in `_next`
                    made[request].add(self._allowed(request, Guess(found.get(request.id, []), head.name)))

    def _is_read(self, request: Request) -> bool:
        """Whether the head is to know a request: not where its drafts are not worth their time."""
        if self._is_fixed or self.head is None:
            return True
        if request.num_left > 1:
            guesser = self._guesser(1)
            return guesser is not None and self._choice.may_pay(self._seen(request), guesser)
        return self._choice.is_tried_soon(self._seen(request))

    def wants_hidden(self, request: Request) -> bool:
        """Whether `observe` is to be told the hidden states of a request's tokens."""
        return bool(self.head and may_draft(request) and self.head.wants_hidden(request) and self._is_read(request))

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """Tells the head a request's hidden states, see `Head.observe`."""
        if self.head:
            self.head.observe(request, start, hidden)

    def _room(self, request: Request, spare: Spare) -> int:
        """The most drafts that a step has room for and the answer needs."""
        left = request.params.max_tokens - len(request.output_ids) - 1
        return max(0, min(self._num_drafts, spare.tokens, spare.rows, left))

    def _most(self, request: Request, spare: Spare) -> tuple[int, int]:
        """The same of drafts from texts and from the head that are as good as others were, and so may not pay."""
        room = self._room(request, spare)
        of_texts, of_head = (room, room) if spare.widths is None else spare.widths[request.id]
        return min(room, of_texts), min(room, of_head)

    def _guessed(self, request: Request, room: int, paying: int) -> Drafts:
        """Guesses of a request's next tokens, all of them before the first that would end the answer: up to `room` that
        a grammar forces, and up to `paying` with others."""
        if request.lookup is None:
            of_salt = self._answers, request.cache_salt
            request.lookup = Lookup(len(request.prompt_ids), request.prediction, *of_salt)
        drafts = Drafts()
        for _ in range(ROUNDS):
            guess = self._next(request, room - len(drafts), paying - len(drafts), drafts.tokens)
            if not guess.tokens:
                break
            drafts.add(guess)
        return drafts

    def _next(self, request: Request, room: int, paying: int, drafts: list[int]) -> Guess:
        """What may follow the drafts: up to `room` tokens that a grammar forces, or else up to `paying` that the source
        says and the grammar allows."""
        output_ids, mask = request.output_ids, request.params.logits_mask
        assert mask is None or isinstance(mask, SpeculativeMask), "see may_draft"
        try:
            forced = mask.forced(output_ids, drafts)[:room] if mask and room > 0 else []
            if forced:
                return Guess(forced[: self._num_before_end(request, forced)], FORCED)
            guess = self._source(request, paying, drafts) if self._source and paying > 0 else NOTHING
            return self._allowed(request, guess, drafts)
        except ValueError:  # a limit of the grammar: where the answer itself reaches it, its next mask says so
            return NOTHING

    def _allowed(self, request: Request, guess: Guess, drafts: Sequence[int] = ()) -> Guess:
        """The guess, which follows drafts, before the first token that ends the answer or that a grammar forbids.
        ValueError if a limit of the grammar is reached."""
        mask, tokens = request.params.logits_mask, guess.tokens[: self._num_before_end(request, guess.tokens)]
        if isinstance(mask, SpeculativeMask) and tokens:
            tokens = tokens[: mask.num_allowed(request.output_ids, [*drafts, *tokens]) - len(drafts)]
        return Guess(tokens, guess.source)

    def _width(self, request: Request, drafts: Drafts, paying: int, spare: Spare) -> int:
        """How many of the drafts are worth their rows, now that it is known where they come from.

        paying: how many would be if they were as good as others were.
        """
        if self._is_fixed or not drafts:
            return len(drafts)
        seen = self._seen(request)
        expected, hopes = seen.expected(drafts.sources), seen.hopes()
        as_hoped = len(drafts) <= paying and expected[-1] >= sum(hopes[: len(drafts)]) - 1e-6
        width = len(drafts) if as_hoped else best_width(expected, spare.costs, spare.num_rows, spare.num_new)
        spare.num_new += expected[width]
        return width

    def _seen(self, request: Request) -> Acceptance:
        """How often a request's drafts were right; of a new one, how often those of all were."""
        if request.acceptance is None:
            request.acceptance = self._choice.newcomer()
        return request.acceptance

    def note(self, request: Request, drafts: Drafts, num_right: int) -> None:
        """Takes in how many of a request's drafts were right."""
        self._choice.note(self._seen(request), drafts.sources, num_right)
        self._note_passed_over(request)
        for depth, source in enumerate(drafts.sources):
            counts = self.counts.setdefault(source, DraftCounts())
            counts.drafted[depth] += 1
            counts.right[depth] += depth < num_right

    def _note_passed_over(self, request: Request) -> None:
        """Takes in how right texts would have been where the head guessed: else nobody would look there again once the
        head was better, whatever is found there later, or in another request."""
        guessed, start = self._passed_over.pop(request, (Drafts(), 0))
        came = request.output_ids[start:]
        guessed.cut(len(came))
        if guessed:
            pairs = enumerate(zip(guessed.tokens, came, strict=False))
            right = next((i for i, (guess, token) in pairs if guess != token), len(guessed))
            self._choice.note(self._seen(request), guessed.sources, right)

    def time(self, counts: list[int], num_drafts: int, seconds: float) -> None:
        """Takes in how long a step took that computed so many tokens of each request, and so many drafts in all."""
        if max(counts) == 1:
            self._choice.time(len(counts), num_drafts, seconds - self._seconds_guessing)

    def end(self, request: Request) -> None:
        """Takes leave of a request: others may look in its answer, if it has one."""
        if request.finish_reason in ("stop", "length"):
            self._answers.add(request.cache_salt, request.prompt_ids, request.output_ids)
        request.lookup = request.prediction = None
        if self.head:
            self.head.forget(request)

    def _num_before_end(self, request: Request, drafts: Sequence[int]) -> int:
        """How many drafts there are before the first that would end the answer: nothing follows that one."""
        p = request.params
        ends = set(p.stop_token_ids) | (set() if p.ignore_eos else self._eos_ids)
        return next((i for i, token in enumerate(drafts) if token in ends), len(drafts))
