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

import numpy as np

from lockstep.engine.request import Request
from lockstep.engine.sampling import num_rows
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.speculation.acceptance import FORCED, Acceptance
from lockstep.engine.speculation.draft_head import Head
from lockstep.engine.speculation.draft_width import HEAD, TEXTS, Guesser, WidthChoice
from lockstep.engine.speculation.earlier_answers import EarlierAnswers
from lockstep.engine.speculation.lookup import Guess, Lookup
from lockstep.text.speculative_mask import SpeculativeMask

MAX_DRAFTS, MOST_BY_ITSELF = 15, 7  # of a request in a step: that may be asked for; where the width follows what pays
ROUNDS = 4  # of asking for drafts that follow other drafts
NOTHING = Guess([], "")
DOUBTED = 0.99  # of the time that a head takes, for each step in which it was not asked


@dataclass
class Spare:
    """What a step has left: tokens, and rows that sample."""

    tokens: int
    rows: int


@dataclass(slots=True)
class Drafts:
    """Guessed tokens of a request, in order; where each comes from, and with which others it is judged: see
    `Guess.kind`."""

    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, guess: Guess) -> None:
        """Takes in what may follow them."""
        count = len(guess.tokens)
        self.tokens += guess.tokens
        self.sources += [guess.source] * count
        self.kinds += [guess.kind] * count

    def cut(self, count: int) -> None:
        """Keeps the first `count`."""
        if count < len(self.tokens):
            del self.tokens[count:], self.sources[count:], self.kinds[count:]


# (request, at most how many, drafts of its next tokens): what may follow the drafts
Source = Callable[[Request, int, Sequence[int]], Guess]


def look_up(request: Request, most: int, drafts: Sequence[int]) -> Guess:
    """What followed the same few tokens in the texts that a request looks in."""
    assert request.lookup is not None, "the Drafter makes it"
    request.lookup.extend(request.token_ids(len(request.lookup), request.num_tokens))
    return request.lookup.guess(most, drafts)


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
    DraftCounts}. is_untimed: whether the time of this step is not to be taken in: nothing would follow from it, or a
    like step was timed a few steps ago. may_need_hidden: whether hidden states of this step may be needed.
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
        self._weighs = num_drafts is None or (head is not None and source is not None)
        self._choice = WidthChoice(self._num_drafts, follows=head is not None)
        self._answers = EarlierAnswers()
        # steps that are surely like the last one, of so many requests; sorts of drafts that there are
        self._num_quiet = self._num_rows = 0
        self._sorts = [sort for sort, there_is in ((TEXTS, source), (HEAD, head)) if there_is is not None]
        self.is_untimed = self.may_need_hidden = False
        self.counts: dict[str, DraftCounts] = {}

    def draft(self, plan: list[tuple[Request, int]]) -> dict[Request, Drafts]:
        """Drafts of the next tokens of requests of a step, with pages to put them in, from what the step has left.

        Only for requests that decode and may have drafts.
        """
        if self._num_quiet > 0 and self._is_quiet(plan):
            return {}
        decoding = [request for request, _ in plan if request.num_left == 1]
        able = [request for request in decoding if may_draft(request)]
        looking, guessing, is_due = self._awake(able, len(decoding), len(plan))
        self._passed_over, self._seconds_guessing, self._since_asked = {}, 0.0, self._since_asked + 1
        self.is_untimed, self.may_need_hidden = not self._weighs, self.head is not None
        if not (looking or guessing or is_due):
            self.is_untimed = self.is_untimed or self._choice.was_timed(len(decoding))
            self._num_rows, self._num_quiet = len(plan), 0 if self._is_fixed else self._choice.num_quiet(self._sorts)
            return {}
        spare = self._left(plan)
        made = {request: self._guessed(request, spare, len(decoding)) for request in able} if looking else {}
        is_found = any(made.values())
        if is_due and is_found:
            self._choice.put_off()
        guessing = guessing or (is_due and not is_found)
        if not guessing and not is_found:
            self._choice.found_nothing(len(decoding))
            self.is_untimed = self.is_untimed or self._choice.was_timed(len(decoding))
            return {}
        asked = self._lent(able, made, self._chosen(able, made, len(decoding), spare, guessing), spare)
        if self.head and guessing:
            reads = [(r, 0) for r, _ in plan if r.num_left > 1 and may_draft(r) and self._is_read(r)]
            self._ask(self.head, reads + list(asked.items()), made, sum(count for _, count in plan))
        self.is_untimed = self.is_untimed or not any(
            made.values()
        )  # what it cost to find none is no part of such a step
        return made

    def _is_quiet(self, plan: list[tuple[Request, int]]) -> bool:
        """Whether a step is surely like the last one, for which nothing had to be done."""
        self._num_quiet -= 1
        for request, _ in plan:
            if request.num_left != 1 or request.params.logits_mask:
                self._num_quiet = 0
        if len(plan) != self._num_rows or not self._num_quiet:
            self._num_quiet = 0
            return False
        self._choice.begin()
        self.is_untimed, self.may_need_hidden, self._since_asked = True, False, self._since_asked + 1
        return True

    def _awake(self, able: list[Request], rows: int, num_planned: int) -> tuple[bool, bool, bool]:
        """Whether texts are to be looked in, and whether the head may have something to do, in a step of so many
        requests: not where it is like those before it, in which none of their drafts was worth its row; and whether the
        head is to be tried all the same, if texts say nothing."""
        has_masks = any(request.params.logits_mask for request in able)
        if self._is_fixed:
            return bool(able) and (has_masks or self._source is not None), self.head is not None, False
        self._choice.begin()
        if rows == num_planned and self._choice.is_to_be_timed(rows) and self._head_may_rest:
            return False, False, False
        looks = self._source is not None and bool(able) and not self._choice.rests(TEXTS, rows)
        if self.head is None:
            return looks or has_masks, False, False
        is_idle = rows == num_planned and self._head_may_rest and self._choice.rests(HEAD, rows)
        return looks or has_masks, not is_idle, self._choice.is_due()

    @property
    def _head_may_rest(self) -> bool:
        return self.head is None or self.head.may_rest

    def _left(self, plan: list[tuple[Request, int]]) -> Spare:
        """What is left in a step of so many tokens of each request."""
        limits, tokens = self._scheduler.limits, sum(count for _, count in plan)
        sampled = sum(num_rows(request, count) for request, count in plan)
        return Spare(limits.max_step_tokens - tokens, limits.max_sampled - sampled)

    def _chosen(
        self, able: list[Request], made: dict[Request, Drafts], rows: int, spare: Spare, guessing: bool
    ) -> dict[Request, int]:
        """Cuts the drafts of texts to those that are worth their rows, and says how many the head, if it is asked, is
        to guess instead where that gives more tokens a second."""
        for request in able if len(made) < len(able) else ():
            made[request] = Drafts()
        if not self._weighs:  # there is but one sort, and what a grammar forces is better
            ready = {r: self._ready(r, spare) for r in able if guessing and not made[r]}
            return {request: count for request, count in ready.items() if count}
        seen, found = [self._seen(r) for r in able], [made[r] for r in able]
        most = [self._ready(request, spare) if guessing else 0 for request in able]
        guesser = self._guesser(rows, most) if guessing else None
        kinds = [drafts.kinds for drafts in found]
        choose = self._choice.best if self._is_fixed else self._choice.choose
        widths, asked = choose(seen, kinds, rows, guesser), {}
        for request, drafts, ready, of_texts, of_head in zip(able, found, most, *widths, strict=True):
            if of_head and ready:
                self._passed_over[request], made[request] = (drafts, len(request.output_ids)), Drafts()
                asked[request] = min(of_head, ready)
            else:
                drafts.cut(of_texts)
        return asked

    def _ready(self, request: Request, spare: Spare) -> int:
        """How many drafts the head could give a request."""
        room = self._room(request, spare) if self.head else 0
        return self.head.ready(request, room) if self.head and room else 0

    def _guesser(self, num_requests: int, most: list[int] | None = None) -> Guesser | None:
        """What choosing widths takes from the head, of which each request may have so many drafts; a measured time that
        keeps it from being asked is doubted more and more."""
        if self.head is None:
            return None
        return Guesser(self.head.name, self.head.seconds(num_requests), most, DOUBTED**self._since_asked)

    def _lent(
        self, able: list[Request], made: dict[Request, Drafts], asked: dict[Request, int], spare: Spare
    ) -> dict[Request, int]:
        """Takes what drafts need from what is spare, and cuts them to what there is; returns how many are asked for."""
        for request in able:
            drafts = made[request]
            count = min(asked.get(request) or len(drafts), spare.tokens, spare.rows)
            count = self._scheduler.lend(request, count) if count > 0 else 0
            spare.tokens, spare.rows = spare.tokens - count, spare.rows - count
            drafts.cut(count)
            if request in asked:
                asked[request] = count
        return {request: count for request, count in asked.items() if count}

    def _ask(self, head: Head, asked: list[tuple[Request, int]], made: dict[Request, Drafts], num_planned: int) -> None:
        """Adds what the head guesses."""
        began = time.perf_counter()
        found = head.guess(asked, num_planned)
        self._seconds_guessing = time.perf_counter() - began
        for request, count in asked:
            if count:
                self._since_asked = 0
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

    def _guessed(self, request: Request, spare: Spare, rows: int) -> Drafts:
        """Guesses of a request's next tokens, all of them before the first that would end the answer: what a grammar
        forces, and what texts say."""
        if request.lookup is None:
            of_salt = self._answers, request.cache_salt
            request.lookup = Lookup(len(request.prompt_ids), request.prediction, *of_salt)
        room = paying = self._room(request, spare)
        if request.params.logits_mask is not None and not self._is_fixed:  # what it allows takes time to find out
            paying = min(
                room, self._choice.most_of_texts(self._seen(request), rows, self.head.name if self.head else None)
            )
        drafts = Drafts()
        for _ in range(ROUNDS if room else 0):
            guess = self._next(request, room - len(drafts), paying - len(drafts), drafts.tokens)
            if not guess.tokens:
                break
            drafts.add(guess)
            if len(drafts) >= room:
                break
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
        return guess._replace(tokens=tokens)

    def _seen(self, request: Request) -> Acceptance:
        """How often a request's drafts were right; of a new one, how often those of all were."""
        if request.acceptance is None:
            request.acceptance = self._choice.newcomer()
        return request.acceptance

    def note(self, request: Request, drafts: Drafts, num_right: int) -> None:
        """Takes in how many of a request's drafts were right."""
        if self._weighs:
            is_guess = self.head is not None and drafts.kinds[0] == self.head.name
            self._choice.note(self._seen(request), drafts.kinds, num_right, HEAD if is_guess else TEXTS)
            self._note_passed_over(request)
        for depth, source in enumerate(drafts.sources):
            counts = self.counts.get(source)
            if counts is None:
                counts = self.counts[source] = DraftCounts()
            counts.drafted[depth] += 1
            counts.right[depth] += depth < num_right

    def _note_passed_over(self, request: Request) -> None:
        """Takes in how right texts would have been where the head guessed: else nobody would look there again once the
        head was better, whatever is found there later, or in another request."""
        guessed, start = self._passed_over.pop(request, (None, 0))
        if guessed:
            came = request.output_ids[start:]
            guessed.cut(len(came))
            pairs = enumerate(zip(guessed.tokens, came, strict=False))
            right = next((i for i, (guess, token) in pairs if guess != token), len(guessed))
            self._choice.note(self._seen(request), guessed.kinds, right)

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
        for i, token in enumerate(drafts):
            if token in p.stop_token_ids or (token in self._eos_ids and not p.ignore_eos):
                return i
        return len(drafts)
