"""How many drafts pay: what their rows cost, by measured steps, against how often drafts were right.

Only speed depends on this, so that it may depend on a clock. Numbers of drafts that were not measured are tried in
small steps: a wrong estimate costs little and is soon corrected.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lockstep.engine.speculation.acceptance import FORCED, Acceptance
from lockstep.engine.speculation.step_costs import LONG_AGO, CostTable, StepCosts

TEXTS, HEAD = 0, 1  # the sorts of drafts, each of which is tried by itself: from texts, from a Head
RECONSIDERED = 16  # steps without drafts of a sort after which their number is chosen again; more with the patience
PROBE_EVERY, PROBE_SELDOM = 24, 768  # steps without drafts of a sort until one is tried again: at first, at most
WITHOUT = 8  # steps in a row without a draft of texts that was worth its row, after which texts rest
TOLD_BEFORE, TOLD_AFTER = 8, 2  # steps before a Head is tried, and after its last draft, in which it gets hidden states
TRIED_FOR = 4  # steps for which a Head is tried
TIMED_AGAIN = 16  # steps without drafts, of which one is timed
TIMED_EVERY, MUCH = 48, 1.6  # steps with drafts until one without them is timed, unless drafts gain this factor
WORTH = 1.03  # the least gain, as a factor of tokens a second, for which drafts are made
WORTH_GUESSING = 1.1  # the same for drafts of a Head, which take time to guess and are less certain


class Guesser(NamedTuple):
    """What is known of a Head before it guesses. name: its source. seconds: of one more guess for all requests of a
    step. most: how many drafts it can give each request; None: any number. doubt: a factor on seconds, which falls with
    every step since they were measured."""

    name: str
    seconds: float
    most: Sequence[int] | None = None
    doubt: float = 1.0

    @property
    def doubted(self) -> float:
        """The seconds times the doubt: a long ago measured time must not keep a Head from being tried."""
        return self.seconds * self.doubt

    def most_of(self, i: int) -> int:
        """How many drafts it can give request number i."""
        return LONG_AGO if self.most is None else self.most[i]


class Widths(NamedTuple):
    """How many drafts each request gets: from texts, and from a Head."""

    of_texts: list[int]
    of_head: list[int]


class Tries:
    """When drafts of one sort that do not pay are tried again, and until when they rest.

    sort: TEXTS or HEAD. follows: whether the Head has to compute a request for a few steps before it can be tried.
    """

    def __init__(self, sort: int, follows: bool) -> None:
        self.sort, self._follows, self.patience, self.last = sort, follows, PROBE_EVERY, 0
        self._without: tuple[int, int] | None = None  # (rows, num_noted) of the last choice, if it was no draft
        self._decided = self._num_without = 0  # the step of the last choice; choices of no draft in a row

    @property
    def _pause(self) -> int:
        """Steps after which the number of drafts is chosen again."""
        return max(RECONSIDERED, self.patience // 6)

    def rests_until(self) -> int:
        """The first step in which a sort that rests now may no longer rest."""
        until = self._decided + self._pause + 1
        return until if self.sort == TEXTS else min(until, self.last + self.patience - TOLD_BEFORE)

    def are_near(self, now: int) -> bool:
        """Whether the next try comes within TOLD_BEFORE steps."""
        return now >= self.last + self.patience - TOLD_BEFORE

    def failed(self) -> None:
        """Notes a try that has not paid yet: the time to the next try doubles, if the Head has to follow requests."""
        if self._follows:
            self.patience = min(2 * self.patience, PROBE_SELDOM)

    def decide(self, is_none: bool, rows: int, num_noted: int, now: int) -> None:
        """Notes a choice. is_none: whether no draft was worth its row. num_noted: how often the acceptance of drafts
        of this sort has changed."""
        self._without, self._decided = (rows, num_noted) if is_none else None, now
        self._num_without = self._num_without + 1 if is_none else 0

    def rest(self, rows: int, num_noted: int, now: int) -> bool:
        """Whether drafts rest: the last choice was no draft, a few steps ago, for as many rows, and nothing was noted
        since. Texts say something else in each step, so that they rest only after WITHOUT such choices."""
        if self._without != (rows, num_noted) or now > self._decided + self._pause:
            return False
        return self.sort == HEAD or self._num_without >= WITHOUT


class WidthChoice:
    """Chooses how many drafts each request of a step gets: as many as pay.

    depths: the most drafts of a request. follows: see `Tries`. `rows` is everywhere the number of rows of the step
    without drafts, one for each request. `seen` has the Acceptance of each request.
    """

    def __init__(self, depths: int, follows: bool = False) -> None:
        self._depths, self._everybody, self._costs = depths, Acceptance(depths), CostTable()
        self._tries = Tries(TEXTS, False), Tries(HEAD, follows)
        self._num_steps = self._last_timed = 0
        self._gain = 1.0  # the expected gain of the last choice, as a factor of tokens a second
        self._num_noted = [0, 0]  # by sort: how often the acceptance of its drafts has changed
        self._tried: Acceptance | None = None  # of the request for which the Head is tried
        self._tried_since = 0  # the step in which that began

    def newcomer(self) -> Acceptance:
        """The Acceptance of a new request."""
        acceptance, self._num_noted = Acceptance(self._depths, self._everybody), [n + 1 for n in self._num_noted]
        acceptance.last = [self._num_steps] * 2
        return acceptance

    def costs(self, requests: int) -> StepCosts:
        """The StepCosts of steps with this many requests."""
        return self._costs.among(requests)

    def begin(self) -> None:
        """Begins a step."""
        self._num_steps += 1

    def rests(self, sort: int, rows: int) -> bool:
        """Whether drafts of a sort rest in this step: as in the steps before, none would be worth its row."""
        return self._tries[sort].rest(rows, self._num_noted[sort], self._num_steps)

    def found_nothing(self, rows: int) -> None:
        """Notes that texts had no draft for a step."""
        self._tries[TEXTS].decide(True, rows, self._num_noted[TEXTS], self._num_steps)

    def is_head_due(self) -> bool:
        """Whether the Head is to be tried in this step."""
        return self._num_steps >= self._tries[HEAD].last + self._tries[HEAD].patience or self._tried is not None

    def put_off(self) -> None:
        """Puts the try of the Head off for some steps, since texts have drafts now."""
        self._tries[HEAD].last, self._tried = self._num_steps + PROBE_EVERY - self._tries[HEAD].patience, None

    def num_quiet(self, sorts: Sequence[int]) -> int:
        """For how many steps after this one, in which drafts of these sorts rest, they rest while the requests stay the
        same."""
        return min(self._tries[sort].rests_until() for sort in sorts) - self._num_steps - 1

    def was_timed(self, rows: int) -> bool:
        """Whether a step of this many rows without drafts was timed a few steps ago."""
        return self.costs(rows).num_since(rows) + self._num_steps - self._last_timed < TIMED_AGAIN

    def is_to_be_timed(self, rows: int) -> bool:
        """Whether a step of this many rows is to be timed without drafts: the last one was long ago, and drafts do not
        gain so much that its time hardly matters."""
        costs, since = self.costs(rows), self._num_steps - self._last_timed
        return not costs.is_sure(rows) or (self._gain < MUCH and costs.num_since(rows) + since > TIMED_EVERY)

    def choose(
        self, seen: Sequence[Acceptance], kinds_of: Sequence[Sequence[str]], rows: int, head: Guesser | None = None
    ) -> Widths:
        """How many drafts of each request are expected to be worth their rows. A request that has had none of a sort
        for long gets one now and then.

        kinds_of: the kinds of each request's drafts from texts. head: the Guesser, if there is a Head.
        """
        costs, texts = self.costs(rows), [each.hopes_for(kinds) for each, kinds in zip(seen, kinds_of, strict=True)]
        of_texts, of_head, seconds = best_widths(texts, costs, rows), [0] * len(seen), head.seconds if head else 0.0
        if head:
            guesses = [each.hopes_of(head.name)[: head.most_of(i)] for i, each in enumerate(seen)]
            of_head = best_widths(guesses, costs, rows, seconds)
        self._tries[TEXTS].decide(not any(of_texts), rows, self._num_noted[TEXTS], self._num_steps)
        if head:
            self._tries[HEAD].decide(not any(of_head), rows, self._num_noted[HEAD], self._num_steps)
            self._go_on_trying(seen, of_head)
        widths = self._better(seen, kinds_of, rows, head, Widths(of_texts, of_head))
        self._note_last(seen, widths)
        self._try(TEXTS, seen, [i for i, kinds in enumerate(kinds_of) if kinds], widths, rows, 0.0)
        if head:
            self._try(HEAD, seen, [i for i, kinds in enumerate(kinds_of) if not kinds], widths, rows, head.doubted)
        self._gain = self._expected_gain(seen, kinds_of, widths, rows, head)
        return widths

    def best(
        self, seen: Sequence[Acceptance], kinds_of: Sequence[Sequence[str]], rows: int, head: Guesser | None = None
    ) -> Widths:
        """The same where the number of drafts is fixed: all drafts of texts, or all of the Head, whichever are
        better."""
        of_texts = [len(kinds) for kinds in kinds_of]
        if head is None:
            return Widths(of_texts, [0] * len(seen))
        return self._better(seen, kinds_of, rows, head, Widths(of_texts, [head.most_of(i) for i in range(len(seen))]))

    def _better(
        self,
        seen: Sequence[Acceptance],
        kinds_of: Sequence[Sequence[str]],
        rows: int,
        head: Guesser | None,
        widths: Widths,
    ) -> Widths:
        """The widths with either drafts of texts or of the Head for each request, whichever give more tokens a second.
        Drafts that a grammar forces are always right, and so are always better."""
        for i, (each, kinds) in enumerate(zip(seen, kinds_of, strict=True)):
            texts, guesses = widths.of_texts[i], widths.of_head[i]
            if not (texts and guesses and head):
                continue
            forced = kinds[0] == FORCED
            if forced or self._speed(each.hopes_for(kinds[:texts]), rows) >= self._speed(
                each.hopes_of(head.name)[:guesses], rows, head.seconds
            ):
                widths.of_head[i] = 0
            else:
                widths.of_texts[i] = 0
        return widths

    def _speed(self, hopes: Sequence[float], rows: int, seconds_of_guess: float = 0.0) -> float:
        """Tokens a second of a step with these drafts of one request."""
        return (rows + sum(hopes)) / (self.costs(rows).of(rows + len(hopes)) + len(hopes) * seconds_of_guess)

    def _note_last(self, seen: Sequence[Acceptance], widths: Widths) -> None:
        """Notes this step as the last one with drafts, for the requests that have some."""
        for sort, counts in enumerate(widths):
            for each, count in zip(seen, counts, strict=True):
                if count:
                    each.last[sort] = self._num_steps

    def is_tried_soon(self, seen: Acceptance) -> bool:
        """Whether a request had guesses of the Head a few steps ago, or may get one in a few steps."""
        return self._num_steps - seen.last[HEAD] < TOLD_AFTER or self._tries[HEAD].are_near(self._num_steps)

    def may_pay(self, seen: Acceptance, head: Guesser) -> bool:
        """Whether the Head's drafts of a request would be worth their rows if it decoded alone, or nothing is
        measured."""
        costs = self.costs(1)
        return not costs.knows(1) or any(best_widths([seen.hopes_of(head.name)], costs, 1, head.seconds))

    def most_of_texts(self, seen: Acceptance, rows: int, head: str | None) -> int:
        """How many drafts of texts would be worth their rows if they came from the best source at each depth. head: the
        source of the Head's drafts, which is left out."""
        return best_widths([seen.hopes(head)], self.costs(rows), rows)[0]

    def try_again(self, seen: Acceptance) -> None:
        """Notes that the Head could not guess yet for a request that was to be tried: the next step tries it again."""
        seen.last[HEAD] = self._tries[HEAD].last = -LONG_AGO

    def _try(
        self,
        sort: int,
        seen: Sequence[Acceptance],
        candidates: Sequence[int],
        widths: Widths,
        rows: int,
        seconds_of_guess: float,
    ) -> None:
        """Gives one draft of a sort to the candidate that has had none for the longest time, if it is time to try and
        drafts that are always right would pay."""
        tries, now = self._tries[sort], self._num_steps
        if now < tries.last + tries.patience:
            return
        longest = min(candidates, key=lambda i: seen[i].last[sort], default=None)
        if longest is None:
            return
        if now < seen[longest].last[sort] + tries.patience:
            tries.last = seen[longest].last[sort]
            return
        if not any(best_widths([[1.0] * self._depths] * len(seen), self.costs(rows), rows, seconds_of_guess)):
            tries.last = now
            return
        tries.last = seen[longest].last[sort] = now
        widths[sort][longest] = 1
        tries.failed()
        if sort == HEAD:
            self._tried, self._tried_since = seen[longest], now

    def _go_on_trying(self, seen: Sequence[Acceptance], of_head: list[int]) -> None:
        """Gives the request for which the Head is tried two guesses in each of TRIED_FOR steps: in the first step the
        Head's weights are not in the CPU's cache, and one step says little."""
        if any(of_head):
            self._tries[HEAD].patience = PROBE_EVERY
        if self._tried is not None and self._num_steps >= self._tried_since + TRIED_FOR:
            self._tried = None
        if self._tried in seen:
            of_head[seen.index(self._tried)] = max(2, of_head[seen.index(self._tried)])

    def _expected_gain(
        self,
        seen: Sequence[Acceptance],
        kinds_of: Sequence[Sequence[str]],
        widths: Widths,
        rows: int,
        head: Guesser | None,
    ) -> float:
        """The expected tokens a second with these widths, as a factor of those without drafts."""
        costs, tokens = self.costs(rows), float(rows)
        num_drafts = sum(widths.of_texts) + sum(widths.of_head)
        if not num_drafts:
            return 1.0
        for each, kinds, of_texts, of_head in zip(seen, kinds_of, *widths, strict=True):
            tokens += sum(each.hopes_for(kinds[:of_texts])) if of_texts else 0.0
            tokens += sum(each.hopes_of(head.name)[:of_head]) if head and of_head else 0.0
        seconds = costs.of(rows + num_drafts) + max(widths.of_head) * (head.seconds if head else 0.0)
        return tokens / seconds * costs.of(rows) / rows

    def note(self, seen: Acceptance, kinds: Sequence[str], num_right: int, sort: int = TEXTS) -> None:
        """Takes in the kinds of a request's drafts of the last step, and how many were right."""
        self._num_noted[sort] += 1
        self._everybody.note(kinds, num_right)
        seen.note(kinds, num_right)
        if sort == TEXTS and num_right and self._tries[TEXTS].last == self._num_steps:
            seen.last[TEXTS] = self._tries[TEXTS].last = -LONG_AGO

    def time(self, requests: int, num_drafts: int, seconds: float) -> None:
        """Takes in the seconds of a step in which each request had one token, and all together num_drafts drafts."""
        num_steps, self._last_timed = max(1, self._num_steps - self._last_timed), self._num_steps
        if self._tried is not None and self._tried_since == self._num_steps:
            return
        self.costs(requests).note(requests + num_drafts, seconds, num_steps)


def best_widths(
    hopes: Sequence[Sequence[float]], costs: StepCosts, rows: int, seconds_of_guess: float = 0.0
) -> list[int]:
    """How many drafts of each request give the most tokens a second of the whole step.

    hopes: for each request, the probability that each of its drafts, in order, is kept. rows: of the step without
    drafts, each of which gives one token. seconds_of_guess: seconds to guess one more draft of all requests at once.
    """
    if not costs.knows(rows):
        return [0] * len(hopes)
    likely = [(hope, i) for i, each in enumerate(hopes) for hope in each]
    if len(hopes) > 1:  # the drafts of one request are in this order already
        likely.sort(reverse=True)
    del likely[max(0, costs.reach - rows) :]
    seconds, worth = costs.up_to(rows + len(likely)), WORTH_GUESSING if seconds_of_guess else WORTH
    widths, best, most, tokens, deepest = [0] * len(hopes), 0, worth * rows / seconds[rows], float(rows), 0
    for count, (hope, i) in enumerate(likely, 1):
        tokens, widths[i] = tokens + hope, widths[i] + 1
        deepest = max(deepest, widths[i])
        speed = tokens / (seconds[rows + count] + deepest * seconds_of_guess)
        if speed > most:
            best, most = count, speed
    for _, i in likely[best:]:
        widths[i] -= 1
    return widths
