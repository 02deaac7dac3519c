"""How many drafts pay: what they cost, by measured steps, against how often they were right.

Only speed follows from this, and so may follow a clock. Whatever is not known is tried in small steps: a wrong guess
about a machine or a text costs little, and is soon corrected.
"""

import itertools
import operator
from collections.abc import Sequence, Set
from typing import NamedTuple

from lockstep.engine.step_costs import LONG_AGO, CostTable, StepCosts

FIRST_GUESS = 0.5  # that a draft is right, before any was seen; it counts for so many seen ones:
PRIOR = 1
FORCED = "grammar"  # the source of drafts that nothing else may stand for
LEAST_GAIN, LEAST_GAIN_OF_ALL = 0.1, 0.03  # of an average, that a new value has: of a request, of all requests
OWN_AFTER = 4  # drafts of a request, after which what was seen of it counts, and not what was seen of all
RECONSIDERED = 16  # steps without drafts, after which costs may say something else
PROBE_EVERY, PROBE_SELDOM = 24, 192  # steps without drafts, after which one is tried again: at first, and at most
TOLD_BEFORE = 8  # steps before a draft is tried again, and after the last one, in which a head still follows
TIMED_EVERY, MUCH = 48, 1.6  # steps with drafts, after which one has none so that it is timed, unless they gain so much
WORTH = 1.03  # times as many tokens a second as without, from which drafts are made
WORTH_GUESSING = 1.1  # the same of drafts that take time to guess, of which less is known


class Rates:
    """How often drafts from one source were right, by depth, if those before were; and how many were seen."""

    def __init__(self, rates: list[float], counts: list[int], least_gain: float) -> None:
        self.rates, self._counts, self._least_gain = rates, counts, least_gain

    def note(self, depth: int, is_right: bool) -> None:
        """Takes in a draft. Depths that were not seen yet are taken to be as good as the one before them."""
        gain = max(self._least_gain, 1 / (self._counts[depth] + PRIOR + 1))
        self.rates[depth] += gain * (is_right - self.rates[depth])
        self._counts[depth] += 1
        for deeper in range(depth + 1, len(self.rates)):
            if self._counts[deeper]:
                break
            self.rates[deeper] = self.rates[depth]

    def of_one(self) -> "Rates":
        """The same for one of many: what it shows itself soon counts more."""
        return Rates(list(self.rates), [min(count, OWN_AFTER) for count in self._counts], LEAST_GAIN)


class Acceptance:
    """How often the draft at each depth is right, if those before it were, by where it comes from.

    everybody: what was seen of all requests, which counts until enough was seen of this one.
    """

    def __init__(self, depths: int, everybody: "Acceptance | None" = None) -> None:
        self._depths, self._everybody = depths, everybody
        self._rates: dict[str, Rates] = {}
        self._num_seen: dict[str, int] = {}
        self.last_draft = 0  # the number of the step that had one

    def of(self, source: str) -> list[float]:
        """[depth]: how often a draft from there is right."""
        return self.rates_of(source).rates

    def rates_of(self, source: str) -> Rates:
        """The Rates of drafts from there."""
        found = self._rates.get(source)
        if found is None and self._everybody is not None:
            return self._everybody.rates_of(source)
        if found is None:
            found = Rates([FIRST_GUESS] * self._depths, [0] * self._depths, LEAST_GAIN_OF_ALL)
            self._rates[source] = found
        return found

    def note(self, sources: Sequence[str], num_right: int) -> None:
        """Takes in a step with drafts, by where each came from; those after the first wrong one say nothing.

        What was seen of all requests has them already.
        """
        for depth, source in enumerate(sources[: num_right + 1]):
            if self._everybody is None or source in self._rates:
                self.rates_of(source).note(depth, depth < num_right)
        for source in set(sources[:1]) if self._everybody is not None else ():
            self._num_seen[source] = self._num_seen.get(source, 0) + 1
            if self._num_seen[source] == OWN_AFTER:
                self._rates[source] = self.rates_of(source).of_one()

    def expected(self, sources: Sequence[str]) -> list[float]:
        """[k]: tokens that the first k of these drafts give beside the certain one, on average."""
        total, survives, made = 0.0, 1.0, [0.0]
        for depth, source in enumerate(sources):
            survives *= self.of(source)[depth]
            total += survives
            made.append(total)
        return made

    def hopes(self, but_of: str | None = None) -> list[float]:
        """[depth]: how likely a draft is right and all before it, if they come from the best source at each depth, of
        all but one. What a grammar forces is always right, and comes or does not: nothing follows from it for other
        drafts."""
        sources = [source for source in self.sources if source not in (FORCED, but_of)]
        known = [self.of(source) for source in sources] or [[FIRST_GUESS] * self._depths]
        survives, made = 1.0, []
        for rates in zip(*known, strict=True) if len(known) > 1 else ((rate,) for rate in known[0]):
            survives *= max(rates)
            made.append(survives)
        return made

    def hopes_of(self, source: str) -> list[float]:
        """The same of drafts from one source."""
        return list(itertools.accumulate(self.of(source), operator.mul))

    @property
    def sources(self) -> Set[str]:
        """Where drafts came from, of this request and of all."""
        return self._rates.keys() | self._everybody.sources if self._everybody is not None else self._rates.keys()


class Guesser(NamedTuple):
    """A model that guesses: what its drafts are counted under, the seconds of one more guess for all requests of a
    step, and whether texts are looked in first."""

    name: str
    seconds: float
    is_second: bool


class Widths(NamedTuple):
    """How many drafts of each request pay: those that texts give, and those that a head guesses."""

    of_texts: list[int]
    of_head: list[int]


class WidthChoice:
    """Decides how many drafts the requests of a step have, where as many are made as pay.

    depths: the most of one request. follows: whether whoever guesses has to follow a request for a few steps before it
    is tried.
    """

    def __init__(self, depths: int, follows: bool = False) -> None:
        self._depths, self._everybody, self._costs = depths, Acceptance(depths), CostTable()
        self._follows, self._patience = follows, PROBE_EVERY  # and steps from one try to the next
        self._num_steps = self._last_probe = self._last_timed = 0
        self._num_noted = 0  # changes of what is known of drafts
        self._next: Acceptance | None = None  # who soon is given a draft to try
        self._without: tuple[int, int] | None = None  # rows, and what was noted, when none was worth it
        self._decided = 0  # in which step that was

    def newcomer(self) -> Acceptance:
        """What is known of a new request's drafts."""
        made, self._num_noted = Acceptance(self._depths, self._everybody), self._num_noted + 1
        made.last_draft = self._num_steps
        return made

    def costs(self, requests: int) -> StepCosts:
        """What steps of so many requests cost."""
        return self._costs.among(requests)

    def choose(self, seen: Sequence[Acceptance], rows: int, head: Guesser | None = None) -> Widths:
        """How many drafts of each request are worth their rows, if what is known of it holds.

        rows: of the step without drafts. head: who guesses where texts do not. A request that has had none for long is
        given one now and then.
        """
        self._num_steps += 1
        widths, seconds = self._paying(seen, rows, head), head.seconds if head else 0.0
        for each, *both in zip(seen, *widths, strict=True):
            each.last_draft = self._num_steps if any(both) else each.last_draft
        self._next = None
        if self._num_steps - self._last_probe >= self._wakes_after:
            self._probe(seen, widths, rows, seconds)
        if any(map(any, widths)) and self._is_to_be_timed(seen, widths, rows, head):
            widths = Widths([0] * len(seen), [0] * len(seen))
        self._without = None if any(map(any, widths)) else (rows, self._num_noted)
        self._decided = self._num_steps
        return widths

    def _paying(self, seen: Sequence[Acceptance], rows: int, head: Guesser | None) -> Widths:
        """The Widths with which there are the most tokens a second."""
        costs, none = self.costs(rows), [0] * len(seen)
        if head is None:
            return Widths(best_widths([each.hopes() for each in seen], costs, rows), none)
        of_texts = best_widths([each.hopes(head.name) for each in seen], costs, rows) if head.is_second else none
        return Widths(of_texts, best_widths([each.hopes_of(head.name) for each in seen], costs, rows, head.seconds))

    def rests(self, rows: int) -> bool:
        """Whether, a few steps ago, no draft was worth its row in such a step, nothing was noted of drafts since, and
        none is to be tried. Then this step has none either, and nothing is to be chosen."""
        now = self._num_steps + 1
        if self._without != (rows, self._num_noted) or now > self._decided + RECONSIDERED:
            return False
        if now >= self._last_probe + self._wakes_after:
            return False
        self._num_steps = now
        return True

    @property
    def _wakes_after(self) -> int:
        """Steps after a try that nothing is to be done for the next one."""
        return self._patience - TOLD_BEFORE * self._follows

    def is_tried_soon(self, seen: Acceptance) -> bool:
        """Whether a request had drafts lately, or is the next that is given one to try."""
        return seen is self._next or self._num_steps - seen.last_draft < TOLD_BEFORE

    def may_pay(self, seen: Acceptance, head: Guesser) -> bool:
        """Whether a head's drafts of a request are worth their rows once it decodes alone, or it is not known yet."""
        costs = self.costs(1)
        return not costs.knows(1) or any(best_widths([seen.hopes_of(head.name)], costs, 1, head.seconds))

    def try_again(self, seen: Acceptance) -> None:
        """Notes that there was no guess to be tried, and will soon be one."""
        seen.last_draft = self._last_probe = -LONG_AGO

    def _probe(self, seen: Sequence[Acceptance], widths: Widths, rows: int, seconds_of_guess: float) -> None:
        """Gives the request that has had no draft for the longest time one, if sure ones would pay; a few steps before,
        it is the next."""
        longest = min(range(len(seen)), key=lambda i: seen[i].last_draft, default=None)
        if longest is None or self._num_steps - seen[longest].last_draft < self._wakes_after:
            return
        if not any(best_widths([[1.0] * self._depths] * len(seen), self.costs(rows), rows, seconds_of_guess)):
            self._last_probe = self._num_steps
            return
        self._next = seen[longest]
        if self._num_steps - max(self._last_probe, seen[longest].last_draft) >= self._patience:
            self._last_probe = seen[longest].last_draft = self._num_steps
            widths.of_texts[longest] = widths.of_head[longest] = 1
            if self._follows:  # to follow a request costs time: after tries that gave nothing, less often
                self._patience = min(2 * self._patience, PROBE_SELDOM)

    def _is_to_be_timed(self, seen: Sequence[Acceptance], widths: Widths, rows: int, head: Guesser | None) -> bool:
        """Whether it is long ago that a step like this one was timed without drafts, which may cost less by now, and
        drafts do not gain so much that it hardly matters."""
        costs, tokens = self.costs(rows), float(rows)
        if costs.num_since(rows) < TIMED_EVERY:
            return False
        most = [max(both) for both in zip(*widths, strict=True)]
        tokens += sum(sum(each.hopes()[:width]) for each, width in zip(seen, most, strict=True))
        seconds = costs.of(rows + sum(most)) + max(widths.of_head) * (head.seconds if head else 0.0)
        return tokens / seconds < MUCH * rows / costs.of(rows)

    def note(self, seen: Acceptance, sources: Sequence[str], num_right: int) -> None:
        """Takes in where a request's drafts of the last step came from, and how many were right."""
        self._num_noted += 1
        self._everybody.note(sources, num_right)
        seen.note(sources, num_right)
        if num_right and self._last_probe == self._num_steps:
            self._patience = PROBE_EVERY
            self.try_again(seen)

    def time(self, requests: int, num_drafts: int, seconds: float) -> None:
        """Takes in how long a step of so many requests, each with one token and all with so many drafts, took."""
        num_steps, self._last_timed = max(1, self._num_steps - self._last_timed), self._num_steps
        self.costs(requests).note(requests + num_drafts, seconds, num_steps)


def best_width(expected: Sequence[float], costs: StepCosts, rows: int, tokens: float) -> int:
    """How many drafts give the most tokens a second.

    expected: for each number of them, see Acceptance. rows, tokens: what the step has and gives without them.
    """
    best, most = 0, WORTH * tokens / costs.of(rows)
    for k in range(1, min(len(expected), costs.reach - rows + 1)):
        speed = (tokens + expected[k]) / costs.of(rows + k)
        if speed > most:
            best, most = k, speed
    return best


def best_widths(
    hopes: Sequence[Sequence[float]], costs: StepCosts, rows: int, seconds_of_guess: float = 0.0
) -> list[int]:
    """How many drafts of each request give the most tokens a second together.

    hopes: for each request, how likely each of its drafts, in order, is kept. rows: of the step without drafts, each of
    which gives a token. seconds_of_guess: what it takes to guess one more draft, of all requests at once.
    """
    if not costs.knows(rows):
        return [0] * len(hopes)
    likely = sorted(((hope, i) for i, each in enumerate(hopes) for hope in each), reverse=True)
    likely = likely[: max(0, costs.reach - rows)]
    worth = WORTH_GUESSING if seconds_of_guess else WORTH
    widths, best, most, tokens, deepest = [0] * len(hopes), 0, worth * rows / costs.of(rows), float(rows), 0
    for count, (hope, i) in enumerate(likely, 1):
        tokens, widths[i] = tokens + hope, widths[i] + 1
        deepest = max(deepest, widths[i])
        speed = tokens / (costs.of(rows + count) + deepest * seconds_of_guess)
        if speed > most:
            best, most = count, speed
    for _, i in likely[best:]:
        widths[i] -= 1
    return widths
