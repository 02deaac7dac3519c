"""How many drafts pay: what they cost, by measured steps, against how often they were right.

Only speed follows from this, and so may follow a clock. Whatever is not known is tried in small steps: a wrong guess
about a machine or a text costs little, and is soon corrected.
"""

import itertools
from collections.abc import Sequence, Set

FIRST_GUESS = 0.5  # that a draft is right, before any was seen; it counts for so many seen ones:
PRIOR = 1
FORCED = "grammar"  # the source of drafts that nothing else may stand for
LEAST_GAIN, LEAST_GAIN_OF_ALL = 0.1, 0.03  # of an average, that a new value has: of a request, of all requests
OWN_AFTER = 4  # drafts of a request, after which what was seen of it counts, and not what was seen of all
RECONSIDERED = 16  # steps without drafts, after which costs may say something else
LONG_AGO = 1 << 30  # steps
PROBE_EVERY, PROBE_SELDOM = 24, 192  # steps without drafts, after which one is tried again: at first, and at most
TOLD_BEFORE = 8  # steps before a draft is tried again, and after the last one, in which a head still follows
TIMED_EVERY, MUCH = 48, 1.6  # steps with drafts, after which one has none so that it is timed, unless they gain so much
WORTH = 1.03  # times as many tokens a second as without, from which drafts are made
WORTH_GUESSING = 1.1  # the same of drafts that take time to guess, of which less is known
CHEAPEST = 0.02  # of a step, for each further row: less is an error of measurement, or others' doing
BEND = 12  # further rows that cost as much as the first, before any was measured
FASTER, SLOWER = 0.3, 0.1  # what a quicker step moves an average, and a slower one: others on the machine only slow it
GUESS_GAIN = 0.15  # what a measured guess moves an average
DOUBTED = 1.25  # times what was expected: more is not believed before it was seen twice
CHANGED = 0.02  # of a cost, from which others follow
FORGET_AFTER = 256  # steps, after which what a number of rows cost has to be found out again


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

    def hopes(self) -> list[float]:
        """[depth]: how likely a draft is right and all before it, if they come from the best source at each depth. What
        a grammar forces is always right, and comes or does not: nothing follows from it for other drafts."""
        known = [self.of(source) for source in self.sources if source != FORCED] or [[FIRST_GUESS] * self._depths]
        survives, made = 1.0, []
        for rates in zip(*known, strict=True) if len(known) > 1 else ((rate,) for rate in known[0]):
            survives *= max(rates)
            made.append(survives)
        return made

    @property
    def sources(self) -> Set[str]:
        """Where drafts came from, of this request and of all."""
        return self._rates.keys() | self._everybody.sources if self._everybody is not None else self._rates.keys()


class StepCosts:
    """Seconds of a step by its rows, with one number of requests: averages of what was measured."""

    def __init__(self, faster: float = FASTER, slower: float = SLOWER) -> None:
        self._gains = slower, faster
        self._seconds: dict[int, float] = {}
        self._once: dict[int, float] = {}  # numbers of rows that were measured once only
        self._noted: dict[int, int] = {}  # when each was measured last, in steps
        self._num_steps, self._forgets_at = 0, FORGET_AFTER
        self._curve: list[float] = []  # by rows, made when it is asked for, of these:
        self._drawn: dict[int, float] = {}

    def __len__(self) -> int:
        """How many numbers of rows were measured."""
        return len(self._noted)

    def note(self, rows: int, seconds: float, num_steps: int = 1) -> None:
        """Takes in a step, the only one of num_steps that was measured."""
        self._num_steps += num_steps
        self._noted[rows] = self._num_steps
        before = self._seconds.get(rows)
        if before is not None:
            gain = self._gains[seconds < before]
            self._seconds[rows] = after = before + gain * (min(seconds, 2 * before) - before)
            if abs(after - self._drawn.get(rows, 0.0)) > CHANGED * after:
                self._changed()
        else:
            once = self._once.pop(rows, None)
            if once is None:
                self._once[rows] = seconds
            else:
                self._seconds[rows] = min(once, seconds)
            self._changed()
        if self._num_steps >= self._forgets_at:
            self._forget()

    def _forget(self) -> None:
        """Leaves out what was not measured for long: where it was too much, by chance, nobody would try it again."""
        since = self._num_steps - FORGET_AFTER
        for rows in [n for n, step in self._noted.items() if step <= since]:
            del self._noted[rows]
            self._seconds.pop(rows, None)
            self._once.pop(rows, None)
        self._forgets_at = self._num_steps + FORGET_AFTER
        self._changed()

    def _changed(self) -> None:
        self._curve = []

    def num_since(self, rows: int) -> int:
        """Steps since one of so many rows was measured."""
        return self._num_steps - self._noted.get(rows, -LONG_AGO)

    def knows(self, rows: int) -> bool:
        """Whether a step of so many rows, or of fewer, was measured."""
        return any(n <= rows for n in self._noted)

    @property
    def reach(self) -> int:
        """The most rows that are to be tried: few more than were ever measured."""
        most = max(self._noted, default=0)
        return most + max(2, most // 4)

    def of(self, rows: int) -> float:
        """Seconds that a step of so many rows may take, 1 if none was ever measured: never more than one of more rows
        (where such a one was quicker, others slowed this one), and at least a little more than one of fewer."""
        if len(self._curve) <= rows:
            self._curve, self._drawn = self._made(max(rows, self.reach)), dict(self._seconds)
        return self._curve[rows]

    def _made(self, most: int) -> list[float]:
        if not self._noted:
            return [1.0] * (most + 1)
        if not self._seconds or not self._once:
            return curve(self._seconds or self._once, most)
        expected = curve(self._seconds, most)
        believed = {n: min(seconds, DOUBTED * expected[n]) for n, seconds in self._once.items()}
        return curve(self._seconds | believed, most)


def curve(seconds: dict[int, float], most: int) -> list[float]:
    """[rows]: seconds of steps of up to so many rows, from those of some."""
    rows, least = sorted(seconds), []
    for n in reversed(rows):
        least.append(min([seconds[n], *least[-1:]]))
    least.reverse()
    made = [least[0]] * (rows[0] + 1)
    for i, (low, high) in enumerate(itertools.pairwise(rows)):
        each = (least[i + 1] - least[i]) / (high - low)
        made += [least[i] + each * (n - low) for n in range(low + 1, high + 1)]
    first, last = rows[0], rows[-1]
    made = [max(each, least[0] * (1 + CHEAPEST * (n - first))) for n, each in enumerate(made)]
    each = made[-1] / (last + BEND)
    if len(rows) > 1:
        each = max(each, (least[-1] - least[-2]) / (last - rows[-2]))
    return made + [made[-1] + each * (n - last) for n in range(last + 1, most + 1)]


class CostTable:
    """The StepCosts of each number of requests: of similar numbers the same."""

    def __init__(self) -> None:
        self._groups: dict[int, StepCosts] = {}

    def among(self, requests: int) -> StepCosts:
        """Those of steps with so many requests."""
        group = requests if requests <= 4 else 2 + requests.bit_length()  # 5 to 7, 8 to 15, ...
        found = self._groups.get(group)
        if found is None:
            found = self._groups[group] = StepCosts()
        return found


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

    def choose(self, seen: Sequence[Acceptance], rows: int, seconds_of_guess: float = 0.0) -> list[int]:
        """How many drafts of each request are worth their rows, if what is known of it holds.

        rows: of the step without drafts. seconds_of_guess: see `best_widths`. A request that has had none for long is
        given one now and then.
        """
        self._num_steps += 1
        widths = best_widths([each.hopes() for each in seen], self.costs(rows), rows, seconds_of_guess)
        for each, width in zip(seen, widths, strict=True):
            each.last_draft = self._num_steps if width else each.last_draft
        self._next = None
        if self._num_steps - self._last_probe >= self._wakes_after:
            self._probe(seen, widths, rows, seconds_of_guess)
        if any(widths) and self._is_to_be_timed(seen, widths, rows, seconds_of_guess):
            widths = [0] * len(seen)
        self._without = None if any(widths) else (rows, self._num_noted)
        self._decided = self._num_steps
        return widths

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

    def may_pay(self, seen: Acceptance, seconds_of_guess: float) -> bool:
        """Whether drafts of a request are worth their rows once it decodes alone, or it is not known yet."""
        costs = self.costs(1)
        return not costs.knows(1) or any(best_widths([seen.hopes()], costs, 1, seconds_of_guess))

    def try_again(self, seen: Acceptance) -> None:
        """Notes that there was no guess to be tried, and will soon be one."""
        seen.last_draft = self._last_probe = -LONG_AGO

    def _probe(self, seen: Sequence[Acceptance], widths: list[int], rows: int, seconds_of_guess: float) -> None:
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
            widths[longest] = 1
            if self._follows:  # to follow a request costs time: after tries that gave nothing, less often
                self._patience = min(2 * self._patience, PROBE_SELDOM)

    def _is_to_be_timed(
        self, seen: Sequence[Acceptance], widths: Sequence[int], rows: int, seconds_of_guess: float
    ) -> bool:
        """Whether it is long ago that a step like this one was timed without drafts, which may cost less by now, and
        drafts do not gain so much that it hardly matters."""
        costs, tokens = self.costs(rows), float(rows)
        if costs.num_since(rows) < TIMED_EVERY:
            return False
        tokens += sum(sum(each.hopes()[:width]) for each, width in zip(seen, widths, strict=True))
        seconds = costs.of(rows + sum(widths)) + max(widths) * seconds_of_guess
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
