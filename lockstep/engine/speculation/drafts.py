"""Speculative decoding: drafts are guesses of the next tokens, computed in the same step as the token before them, and
kept if they are right.

A draft changes nothing but speed. It takes tokens, sampled rows and pages that a step has left over, so that no request
waits, is preempted or loses a cached block for it. A draft is right if the model chooses the same token, with the noise
of its position and with the request's penalties and masks. A wrong draft leaves nothing to undo: keys and values after
the computed tokens of a request are overwritten before they are read.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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

MAX_DRAFTS = 15  # the most drafts of a request in a step that options may ask for
MOST_BY_ITSELF = 7  # the most where their number follows what pays
ROUNDS = 4  # how many guesses of texts or of a grammar may follow one another in a step
NOTHING = Guess([], "")
DOUBTED = 0.99  # a factor on the measured time of a Head, for each step in which it did not guess


@dataclass
class Spare:
    """The tokens and sampled rows that a step has left over."""

    tokens: int
    rows: int


@dataclass(slots=True)
class Drafts:
    """Guessed tokens of a request in order, and of each token its source and its kind (see `Guess.kind`)."""

    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, guess: Guess) -> None:
        """Appends a guess of the tokens after these drafts."""
        count = len(guess.tokens)
        self.tokens += guess.tokens
        self.sources += [guess.source] * count
        self.kinds += [guess.kind] * count

    def cut(self, num_kept: int) -> None:
        """Keeps the first `num_kept` drafts."""
        if num_kept < len(self.tokens):
            del self.tokens[num_kept:], self.sources[num_kept:], self.kinds[num_kept:]


# (request, most tokens, drafts of its next tokens) -> a Guess of the tokens after these drafts
Source = Callable[[Request, int, Sequence[int]], Guess]


def look_up(request: Request, max_drafts: int, drafts: Sequence[int]) -> Guess:
    """A guess from what followed the same last tokens in the request's texts: see `Lookup`."""
    assert request.lookup is not None, "the Drafter makes it"
    request.lookup.extend(request.token_ids(len(request.lookup), request.num_tokens))
    return request.lookup.guess(max_drafts, drafts)


# {value of the option `speculate`: the source of drafts from texts; None: there is none}
SOURCES: dict[str, Source | None] = {"off": None, "auto": look_up, "mtp": None, "lookup": look_up}
MODEL = "model"  # the value with which a draft model drafts


def may_draft(request: Request) -> bool:
    """Whether a request may have drafts when it decodes: not if it only makes an embedding, nor if its logits_mask is a
    plain function, which knows the mask after computed tokens only."""
    mask = request.params.logits_mask
    return request.pool is None and (mask is None or isinstance(mask, SpeculativeMask))


class DraftCounts:
    """How many drafts of one source were computed, and how many were right, by depth."""

    def __init__(self) -> None:
        self.drafted, self.right = [0] * MAX_DRAFTS, [0] * MAX_DRAFTS


class Active(NamedTuple):
    """Which sorts of drafts a step may have. texts: from texts and grammars. head: from the Head. is_head_due: from the
    Head if texts have none, since it is time to try it again."""

    texts: bool
    head: bool
    is_head_due: bool = False


class Drafter:
    """Gives the requests of a step their drafts.

    source: of drafts from texts, or None. num_drafts: of one request in a step; None: as many as pay. eos_ids: the
    model's end tokens, after which nothing is drafted. head: a Head, which guesses where texts have no better guess.
    counts: {source: DraftCounts}. is_untimed: whether `time` is not to be called for this step: its time would change
    nothing, or a like step was timed a few steps ago. may_need_hidden: whether the Head may need hidden states of this
    step.
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
        self._seconds_guessing = 0.0  # of the Head, in this step
        self._since_guess = 0  # steps since the Head guessed
        # {request: (drafts of texts that guesses of the Head replace in this step, number of tokens of the answer)}
        self._passed_over: dict[Request, tuple[Drafts, int]] = {}
        self._is_fixed, self._num_drafts = num_drafts is not None, num_drafts or MOST_BY_ITSELF
        self._weighs = num_drafts is None or (head is not None and source is not None)  # measures what pays
        self._choice = WidthChoice(self._num_drafts, follows=head is not None)
        self._answers = EarlierAnswers()
        self._num_quiet = self._num_rows = 0  # steps in which all drafts rest while there are _num_rows requests
        self._sorts = [sort for sort, origin in ((TEXTS, source), (HEAD, head)) if origin is not None]
        self.is_untimed = self.may_need_hidden = False
        self.counts: dict[str, DraftCounts] = {}

    def draft(self, plan: list[tuple[Request, int]]) -> dict[Request, Drafts]:
        """Drafts of the next tokens of a step's requests, from the tokens, rows and pages that the step has left over.

        plan: [(request, number of tokens), ...]. Only requests that decode and may have drafts get some.
        """
        if self._num_quiet > 0 and self._is_quiet(plan):
            return {}
        decoding = [request for request, _ in plan if request.num_left == 1]
        able = [request for request in decoding if may_draft(request)]
        active = self._active(able, len(decoding), len(plan))
        self._passed_over, self._seconds_guessing, self._since_guess = {}, 0.0, self._since_guess + 1
        self.is_untimed, self.may_need_hidden = not self._weighs, self.head is not None
        if not any(active):
            self.is_untimed = self.is_untimed or self._choice.was_timed(len(decoding))
            self._num_rows, self._num_quiet = len(plan), 0 if self._is_fixed else self._choice.num_quiet(self._sorts)
            return {}
        spare = self._left(plan)
        drafts_of = {r: self._from_texts(r, spare, len(decoding)) for r in able} if active.texts else {}
        has_drafts = any(drafts_of.values())
        if active.is_head_due and has_drafts:
            self._choice.put_off()
        with_head = active.head or (active.is_head_due and not has_drafts)
        if not with_head and not has_drafts:
            self._choice.found_nothing(len(decoding))
            self.is_untimed = self.is_untimed or self._choice.was_timed(len(decoding))
            return {}
        num_guesses = self._chosen(able, drafts_of, len(decoding), spare, with_head)
        num_guesses = self._lent(able, drafts_of, num_guesses, spare)
        if self.head and with_head:
            prompts = [(r, 0) for r, _ in plan if r.num_left > 1 and may_draft(r) and self._is_followed(r)]
            self._add_guesses(self.head, prompts + list(num_guesses.items()), drafts_of, sum(n for _, n in plan))
        # the time spent without finding a draft is no part of a step without drafts
        self.is_untimed = self.is_untimed or not any(drafts_of.values())
        return drafts_of

    def _is_quiet(self, plan: list[tuple[Request, int]]) -> bool:
        """Whether all drafts still rest in this step, so that nothing has to be done for it."""
        self._num_quiet -= 1
        for request, _ in plan:
            if request.num_left != 1 or request.params.logits_mask:
                self._num_quiet = 0
        if len(plan) != self._num_rows or not self._num_quiet:
            self._num_quiet = 0
            return False
        self._choice.begin()
        self.is_untimed, self.may_need_hidden, self._since_guess = True, False, self._since_guess + 1
        return True

    def _active(self, able: list[Request], rows: int, num_requests: int) -> Active:
        """What is active in a step with `rows` decoding requests of num_requests in all: neither texts nor the Head
        while their drafts rest, since none was worth its row in the steps before."""
        has_masks = any(request.params.logits_mask for request in able)
        if self._is_fixed:
            return Active(bool(able) and (has_masks or self._source is not None), self.head is not None)
        self._choice.begin()
        if rows == num_requests and self._choice.is_to_be_timed(rows) and self._head_may_rest:
            return Active(False, False)
        in_texts = self._source is not None and bool(able) and not self._choice.rests(TEXTS, rows)
        if self.head is None:
            return Active(in_texts or has_masks, False)
        head_rests = rows == num_requests and self._head_may_rest and self._choice.rests(HEAD, rows)
        return Active(in_texts or has_masks, not head_rests, self._choice.is_head_due())

    @property
    def _head_may_rest(self) -> bool:
        return self.head is None or self.head.may_rest

    def _left(self, plan: list[tuple[Request, int]]) -> Spare:
        """The tokens and sampled rows that the plan of a step leaves over."""
        limits, tokens = self._scheduler.limits, sum(num_tokens for _, num_tokens in plan)
        sampled = sum(num_rows(request, num_tokens) for request, num_tokens in plan)
        return Spare(limits.max_step_tokens - tokens, limits.max_sampled - sampled)

    def _chosen(
        self, able: list[Request], drafts_of: dict[Request, Drafts], rows: int, spare: Spare, with_head: bool
    ) -> dict[Request, int]:
        """Cuts the drafts of texts to those that are worth their rows; drops them where guesses of the Head give more
        tokens a second, and returns {request: how many the Head is to guess}."""
        for request in able if len(drafts_of) < len(able) else ():
            drafts_of[request] = Drafts()
        if not self._weighs:  # one sort of drafts: all of them, where a grammar forces none, which are better
            ready = {r: self._ready(r, spare) for r in able if with_head and not drafts_of[r]}
            return {request: num_drafts for request, num_drafts in ready.items() if num_drafts}
        seen, of_text = [self._seen(r) for r in able], [drafts_of[r] for r in able]
        max_drafts = [self._ready(request, spare) if with_head else 0 for request in able]
        guesser = self._guesser(rows, max_drafts) if with_head else None
        kinds = [drafts.kinds for drafts in of_text]
        choose = self._choice.best if self._is_fixed else self._choice.choose
        widths, num_guesses = choose(seen, kinds, rows, guesser), {}
        for request, drafts, ready, of_texts, of_head in zip(able, of_text, max_drafts, *widths, strict=True):
            if of_head and ready:
                self._passed_over[request], drafts_of[request] = (drafts, len(request.output_ids)), Drafts()
                num_guesses[request] = min(of_head, ready)
            else:
                drafts.cut(of_texts)
        return num_guesses

    def _ready(self, request: Request, spare: Spare) -> int:
        """How many drafts the Head could give a request."""
        room = self._room(request, spare) if self.head else 0
        return self.head.ready(request, room) if self.head and room else 0

    def _guesser(self, num_requests: int, max_drafts: list[int] | None = None) -> Guesser | None:
        """The Guesser of the Head. max_drafts: how many drafts it can give each request."""
        if self.head is None:
            return None
        return Guesser(self.head.name, self.head.seconds(num_requests), max_drafts, DOUBTED**self._since_guess)

    def _lent(
        self, able: list[Request], drafts_of: dict[Request, Drafts], num_guesses: dict[Request, int], spare: Spare
    ) -> dict[Request, int]:
        """Takes tokens, rows and pages for drafts, and cuts drafts and num_guesses to what is left over; returns
        num_guesses."""
        for request in able:
            drafts = drafts_of[request]
            num_drafts = min(num_guesses.get(request) or len(drafts), spare.tokens, spare.rows)
            num_drafts = self._scheduler.lend(request, num_drafts) if num_drafts > 0 else 0
            spare.tokens, spare.rows = spare.tokens - num_drafts, spare.rows - num_drafts
            drafts.cut(num_drafts)
            if request in num_guesses:
                num_guesses[request] = num_drafts
        return {request: num_drafts for request, num_drafts in num_guesses.items() if num_drafts}

    def _add_guesses(
        self, head: Head, wanted: list[tuple[Request, int]], drafts_of: dict[Request, Drafts], num_planned: int
    ) -> None:
        """Adds the Head's guesses to the drafts of requests. wanted, num_planned: see `Head.guess`."""
        began = time.perf_counter()
        guesses = head.guess(wanted, num_planned)
        self._seconds_guessing = time.perf_counter() - began
        for request, count in wanted:
            if count:
                self._since_guess = 0
                if head.is_behind(request):
                    self._choice.try_again(self._seen(request))
                with contextlib.suppress(ValueError):  # a limit of the grammar, as in `_next`
                    drafts_of[request].add(self._allowed(request, Guess(guesses.get(request.id, []), head.name)))

    def _is_followed(self, request: Request) -> bool:
        """Whether the Head is to compute a request's known tokens: not if its drafts are not worth their time."""
        if self._is_fixed or self.head is None:
            return True
        if request.num_left > 1:
            guesser = self._guesser(1)
            return guesser is not None and self._choice.may_pay(self._seen(request), guesser)
        return self._choice.is_tried_soon(self._seen(request))

    def wants_hidden(self, request: Request) -> bool:
        """Whether the Head needs the hidden states of a request's tokens, see `observe`."""
        return bool(self.head and may_draft(request) and self.head.wants_hidden(request) and self._is_followed(request))

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """Gives the Head a request's hidden states, see `Head.observe`."""
        if self.head:
            self.head.observe(request, start, hidden)

    def _room(self, request: Request, spare: Spare) -> int:
        """The most drafts for which the step has room and which the answer's max_tokens allow."""
        left = request.params.max_tokens - len(request.output_ids) - 1
        return max(0, min(self._num_drafts, spare.tokens, spare.rows, left))

    def _from_texts(self, request: Request, spare: Spare, rows: int) -> Drafts:
        """Drafts of a request's next tokens from its grammar, which forces some tokens, and from texts; without the
        token that would end the answer."""
        if request.lookup is None:
            request.lookup = Lookup(len(request.prompt_ids), request.prediction, self._answers, request.cache_salt)
        room = paying = self._room(request, spare)
        if request.params.logits_mask is not None and not self._is_fixed:  # checking drafts against it takes time
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
        """The next Guess after the drafts: up to `room` tokens that the grammar forces, or else up to `paying` tokens
        from texts, as far as the grammar allows them."""
        output_ids, mask = request.output_ids, request.params.logits_mask
        assert mask is None or isinstance(mask, SpeculativeMask), "see may_draft"
        try:
            forced = mask.forced(output_ids, drafts)[:room] if mask and room > 0 else []
            if forced:
                return Guess(forced[: self._num_before_end(request, forced)], FORCED)
            guess = self._source(request, paying, drafts) if self._source and paying > 0 else NOTHING
            return self._allowed(request, guess, drafts)
        except ValueError:  # a limit of the grammar: if the answer itself reaches it, its next mask raises, too
            return NOTHING

    def _allowed(self, request: Request, guess: Guess, drafts: Sequence[int] = ()) -> Guess:
        """A guess after drafts, cut before the first token that ends the answer or that the grammar forbids. ValueError
        if a limit of the grammar is reached."""
        mask, tokens = request.params.logits_mask, guess.tokens[: self._num_before_end(request, guess.tokens)]
        if isinstance(mask, SpeculativeMask) and tokens:
            tokens = tokens[: mask.num_allowed(request.output_ids, [*drafts, *tokens]) - len(drafts)]
        return guess._replace(tokens=tokens)

    def _seen(self, request: Request) -> Acceptance:
        """The Acceptance of a request, made with its first drafts."""
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
        """Takes in how many drafts of texts would have been right where the Head guessed instead: else texts would
        never be tried again after the Head was once better."""
        drafts, start = self._passed_over.pop(request, (None, 0))
        if drafts:
            tokens = request.output_ids[start:]
            drafts.cut(len(tokens))
            pairs = enumerate(zip(drafts.tokens, tokens, strict=False))
            num_right = next((i for i, (draft, token) in pairs if draft != token), len(drafts))
            self._choice.note(self._seen(request), drafts.kinds, num_right)

    def time(self, counts: list[int], num_drafts: int, seconds: float) -> None:
        """Takes in the seconds of a step. counts: the number of tokens of each request. num_drafts: of all requests."""
        if max(counts) == 1:
            self._choice.time(len(counts), num_drafts, seconds - self._seconds_guessing)

    def end(self, request: Request) -> None:
        """A request ends: its answer, if it has one, becomes an earlier answer for later requests."""
        if request.finish_reason in ("stop", "length"):
            self._answers.add(request.cache_salt, request.prompt_ids, request.output_ids)
        request.lookup = request.prediction = None
        if self.head:
            self.head.forget(request)

    def _num_before_end(self, request: Request, drafts: Sequence[int]) -> int:
        """How many drafts come before the first one that would end the answer."""
        p = request.params
        for i, token in enumerate(drafts):
            if token in p.stop_token_ids or (token in self._eos_ids and not p.ignore_eos):
                return i
        return len(drafts)
