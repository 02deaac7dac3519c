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
TEXTS, HEAD = 0, 1  # sorts of drafts: each is tried by itself
OWN_AFTER = 4  # drafts of a request, after which what was seen of it counts, and not what was seen of all
RECONSIDERED = 16  # steps without drafts, after which costs may say something else
PROBE_EVERY, PROBE_SELDOM = 24, 192  # steps without drafts of a sort until one is tried again: at first, at most
WITHOUT = 8  # steps on end in which texts had nothing that was worth its row, after which they are left alone
TOLD_BEFORE = 8  # steps before a draft is tried again, and after the last one, in which a head still follows
TIMED_AGAIN = 8  # steps in which texts say nothing, of which one is timed
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
        self.last = [0, 0]  # the number of the step that had a draft of texts, and one of the head

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
        if self._everybody is not None and sources:
            count = self._num_seen[sources[0]] = self._num_seen.get(sources[0], 0) + 1
            if count == OWN_AFTER:
                self._rates[sources[0]] = self.rates_of(sources[0]).of_one()

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

    def hopes_for(self, sources: Sequence[str]) -> list[float]:
        """The same of drafts of which it is known where they come from."""
        survives, made, last, rates = 1.0, [], "", []
        for depth, source in enumerate(sources):
            if source != last:
                last, rates = source, self.of(source)
            survives *= rates[depth]
            made.append(survives)
        return made

    @property
    def sources(self) -> Set[str]:
        """Where drafts came from, of this request and of all."""
        return self._rates.keys() | self._everybody.sources if self._everybody is not None else self._rates.keys()


class Guesser(NamedTuple):
    """A model that guesses: what its drafts are judged by, the seconds of one more guess for all requests of a step,
    and how many it could give each of them (None: as many as may be)."""

    name: str
    seconds: float
    most: Sequence[int] | None = None

    def most_of(self, i: int) -> int:
        """How many it could give request number i."""
        return LONG_AGO if self.most is None else self.most[i]


class Widths(NamedTuple):
    """How many drafts of each request are made: those that texts give, or those that a head guesses."""

    of_texts: list[int]
    of_head: list[int]

    @property
    def are_none(self) -> bool:
        """Whether nobody has any."""
        return not any(self.of_texts) and not any(self.of_head)


class Tries:
    """When drafts of one sort are tried again where they do not pay, and until when nothing has to be chosen.

    sort: TEXTS or HEAD. follows: whether whoever guesses has to follow a request for a few steps before it is tried.
    """

    def __init__(self, sort: int, follows: bool) -> None:
        self.sort, self._follows, self.patience, self.last = sort, follows, PROBE_EVERY, 0
        self._without: tuple[int, int] | None = None  # rows, and what was noted, when none was worth it
        self._decided = self._num_without = 0  # in which step that was, and how many times on end

    @property
    def wakes_after(self) -> int:
        """Steps after a try that nothing is to be done for the next one."""
        return self.patience - TOLD_BEFORE * self._follows

    def failed(self) -> None:
        """Notes a try, from which nothing has come yet: it is the longer to the next where to follow a request costs
        time."""
        if self._follows:
            self.patience = min(2 * self.patience, PROBE_SELDOM)

    def decide(self, is_none: bool, rows: int, num_noted: int, now: int) -> None:
        """Notes whether none was worth its row in a step."""
        self._without, self._decided = (rows, num_noted) if is_none else None, now
        self._num_without = self._num_without + 1 if is_none else 0

    def rest(self, rows: int, num_noted: int, now: int) -> bool:
        """Whether, a few steps ago, none was worth it in such a step, and nothing was noted since; of the head, also
        that none is to be tried: what texts say is another thing in each step."""
        if self._without != (rows, num_noted) or now > self._decided + RECONSIDERED:
            return False
        return self._num_without >= WITHOUT if self.sort == TEXTS else now < self.last + self.wakes_after


class WidthChoice:
    """Decides how many drafts the requests of a step have, where as many are made as pay.

    depths: the most of one request. follows: whether the head has to follow a request for a few steps before it is
    tried.
    """

    def __init__(self, depths: int, follows: bool = False) -> None:
        self._depths, self._everybody, self._costs = depths, Acceptance(depths), CostTable()
        self._tries = Tries(TEXTS, False), Tries(HEAD, follows)
        self._num_steps = self._last_timed = 0
        self._num_noted = 0  # changes of what is known of drafts
        self._next: Acceptance | None = None  # whose guess by the head is soon tried

    def newcomer(self) -> Acceptance:
        """What is known of a new request's drafts."""
        made, self._num_noted = Acceptance(self._depths, self._everybody), self._num_noted + 1
        made.last = [self._num_steps] * 2
        return made

    def costs(self, requests: int) -> StepCosts:
        """What steps of so many requests cost."""
        return self._costs.among(requests)

    def begin(self) -> None:
        """Begins a step."""
        self._num_steps += 1

    def rests(self, sort: int, rows: int) -> bool:
        """Whether no draft of a sort will be worth its row in this step, as in those before it, and none is to be
        tried."""
        return self._tries[sort].rest(rows, self._num_noted, self._num_steps)

    def found_nothing(self, rows: int) -> None:
        """Notes that texts had no draft for a step."""
        self._tries[TEXTS].decide(True, rows, self._num_noted, self._num_steps)

    def was_timed(self, rows: int) -> bool:
        """Whether such a step without drafts was timed a few steps ago."""
        return self._num_steps < self._last_timed + TIMED_AGAIN and self.costs(rows).num_since(rows) < TIMED_EVERY

    def choose(
        self, seen: Sequence[Acceptance], found: Sequence[Sequence[str]], rows: int, head: Guesser | None = None
    ) -> Widths:
        """How many drafts of each request are worth their rows, if what is known of them holds.

        found: the kinds of each request's drafts from texts. rows: of the step without drafts. head: who guesses
        instead. A request that has had none for long is given one now and then.
        """
        costs, texts = self.costs(rows), [each.hopes_for(kinds) for each, kinds in zip(seen, found, strict=True)]
        of_texts, of_head, seconds = best_widths(texts, costs, rows), [0] * len(seen), head.seconds if head else 0.0
        if head:
            guesses = [each.hopes_of(head.name)[: head.most_of(i)] for i, each in enumerate(seen)]
            of_head = best_widths(guesses, costs, rows, seconds)
        self._tries[TEXTS].decide(not any(of_texts), rows, self._num_noted, self._num_steps)
        self._tries[HEAD].decide(not any(of_head), rows, self._num_noted, self._num_steps)
        widths = self._better(seen, found, rows, head, Widths(of_texts, of_head))
        self._note_last(seen, widths)
        self._try(TEXTS, seen, [i for i, kinds in enumerate(found) if kinds], widths, rows, 0.0)
        if head:
            self._next = None
            self._try(HEAD, seen, [i for i in range(len(seen)) if not any(found[i])], widths, rows, seconds)
        if not widths.are_none and self._is_to_be_timed(seen, found, widths, rows, head):
            return Widths([0] * len(seen), [0] * len(seen))
        return widths

    def best(
        self, seen: Sequence[Acceptance], found: Sequence[Sequence[str]], rows: int, head: Guesser | None = None
    ) -> Widths:
        """The same where all that there are are made."""
        of_texts = [len(kinds) for kinds in found]
        if head is None:
            return Widths(of_texts, [0] * len(seen))
        return self._better(seen, found, rows, head, Widths(of_texts, [head.most_of(i) for i in range(len(seen))]))

    def _better(
        self,
        seen: Sequence[Acceptance],
        found: Sequence[Sequence[str]],
        rows: int,
        head: Guesser | None,
        widths: Widths,
    ) -> Widths:
        """The widths with either drafts of texts or of the head for each request, whichever give more tokens a second.
        What a grammar forces is always right."""
        for i, (each, kinds) in enumerate(zip(seen, found, strict=True)):
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
        """Tokens a second with drafts of one request."""
        return (rows + sum(hopes)) / (self.costs(rows).of(rows + len(hopes)) + len(hopes) * seconds_of_guess)

    def _note_last(self, seen: Sequence[Acceptance], widths: Widths) -> None:
        for sort, counts in enumerate(widths):
            for each, count in zip(seen, counts, strict=True):
                if count:
                    each.last[sort] = self._num_steps

    def is_tried_soon(self, seen: Acceptance) -> bool:
        """Whether a request had guesses of the head lately, or is the next that is given one to try."""
        return seen is self._next or self._num_steps - seen.last[HEAD] < TOLD_BEFORE

    def may_pay(self, seen: Acceptance, head: Guesser) -> bool:
        """Whether a head's drafts of a request are worth their rows once it decodes alone, or it is not known yet."""
        costs = self.costs(1)
        return not costs.knows(1) or any(best_widths([seen.hopes_of(head.name)], costs, 1, head.seconds))

    def most_of_texts(self, seen: Acceptance, rows: int, head: str | None) -> int:
        """How many drafts of texts would be worth their rows if they were as good as any."""
        return best_widths([seen.hopes(head)], self.costs(rows), rows)[0]

    def try_again(self, seen: Acceptance) -> None:
        """Notes that there was no guess of the head to be tried, and will soon be one."""
        seen.last[HEAD] = self._tries[HEAD].last = -LONG_AGO

    def _try(
        self,
        sort: int,
        seen: Sequence[Acceptance],
        able: Sequence[int],
        widths: Widths,
        rows: int,
        seconds_of_guess: float,
    ) -> None:
        """Gives the request, of those that can have one, that has had no draft of a sort for the longest time one, if
        sure ones would pay; a few steps before, it is the next."""
        tries, now = self._tries[sort], self._num_steps
        if now < tries.last + tries.wakes_after:
            return
        longest = min(able, key=lambda i: seen[i].last[sort], default=None)
        if longest is None or now - max(tries.last, seen[longest].last[sort]) < tries.wakes_after:
            return
        if not any(best_widths([[1.0] * self._depths] * len(seen), self.costs(rows), rows, seconds_of_guess)):
            tries.last = now
            return
        self._next = seen[longest] if sort == HEAD else self._next
        if now - max(tries.last, seen[longest].last[sort]) >= tries.patience:
            tries.last = seen[longest].last[sort] = now
            widths[sort][longest] = 1
            tries.failed()

    def _is_to_be_timed(
        self,
        seen: Sequence[Acceptance],
        found: Sequence[Sequence[str]],
        widths: Widths,
        rows: int,
        head: Guesser | None,
    ) -> bool:
        """Whether it is long ago that a step like this one was timed without drafts, which may cost less by now, and
        drafts do not gain so much that it hardly matters."""
        costs, tokens = self.costs(rows), float(rows)
        if costs.num_since(rows) < TIMED_EVERY:
            return False
        for each, kinds, of_texts, of_head in zip(seen, found, *widths, strict=True):
            tokens += sum(each.hopes_for(kinds[:of_texts]))
            tokens += sum(each.hopes_of(head.name)[:of_head]) if head else 0.0
        num_drafts = sum(widths.of_texts) + sum(widths.of_head)
        seconds = costs.of(rows + num_drafts) + max(widths.of_head) * (head.seconds if head else 0.0)
        return tokens / seconds < MUCH * rows / costs.of(rows)

    def note(self, seen: Acceptance, kinds: Sequence[str], num_right: int, sort: int = TEXTS) -> None:
        """Takes in of which kinds a request's drafts of the last step were, and how many were right."""
        self._num_noted += 1
        self._everybody.note(kinds, num_right)
        seen.note(kinds, num_right)
        tries = self._tries[sort]
        if num_right and tries.last == self._num_steps:
            tries.patience = PROBE_EVERY
            seen.last[sort] = tries.last = -LONG_AGO

    def time(self, requests: int, num_drafts: int, seconds: float) -> None:
        """Takes in how long a step of so many requests, each with one token and all with so many drafts, took."""
        num_steps, self._last_timed = max(1, self._num_steps - self._last_timed), self._num_steps
        self.costs(requests).note(requests + num_drafts, seconds, num_steps)


def best_widths(
    hopes: Sequence[Sequence[float]], costs: StepCosts, rows: int, seconds_of_guess: float = 0.0
) -> list[int]:
    """How many drafts of each request give the most tokens a second together.

    hopes: for each request, how likely each of its drafts, in order, is kept. rows: of the step without drafts, each of
    which gives a token. seconds_of_guess: what it takes to guess one more draft, of all requests at once.
    """
    if not costs.knows(rows):
        return [0] * len(hopes)
    likely = [(hope, i) for i, each in enumerate(hopes) for hope in each]
    if len(hopes) > 1:  # of one request each is at most as likely as the one before
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
