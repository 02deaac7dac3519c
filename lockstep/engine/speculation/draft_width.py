"""How many drafts pay: what they cost, by measured steps, against how often they were right.

Only speed follows from this, and so may follow a clock. Whatever is not known is tried in small steps: a wrong guess
about a machine or a text costs little, and is soon corrected.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lockstep.engine.speculation.acceptance import FORCED, Acceptance
from lockstep.engine.speculation.step_costs import LONG_AGO, CostTable, StepCosts

TEXTS, HEAD = 0, 1  # sorts of drafts: each is tried by itself
RECONSIDERED = 16  # steps without drafts of a sort, after which costs may say something else; more with the patience
PROBE_EVERY, PROBE_SELDOM = 24, 768  # steps without drafts of a sort until one is tried again: at first, at most
WITHOUT = 8  # steps on end in which texts had nothing that was worth its row, after which they are left alone
TOLD_BEFORE, TOLD_AFTER = 8, 2  # steps before a head is tried again, and after its last draft, in which it is told
TRIED_FOR = 4  # steps with guesses of a head that is tried
TIMED_AGAIN = 16  # steps in which nothing is chosen, of which one is timed
TIMED_EVERY, MUCH = 48, 1.6  # steps with drafts, after which one has none so that it is timed, unless they gain so much
WORTH = 1.03  # times as many tokens a second as without, from which drafts are made
WORTH_GUESSING = 1.1  # the same of drafts that take time to guess, of which less is known


class Guesser(NamedTuple):
    """A model that guesses: what its drafts are judged by, the seconds of one more guess for all requests of a step,
    how many it could give each of them (None: as many as may be), and what those seconds are times, as they are doubted
    the longer it is that they were measured."""

    name: str
    seconds: float
    most: Sequence[int] | None = None
    doubt: float = 1.0

    @property
    def doubted(self) -> float:
        """Seconds, less what they are doubted."""
        return self.seconds * self.doubt

    def most_of(self, i: int) -> int:
        """How many it could give request number i."""
        return LONG_AGO if self.most is None else self.most[i]


class Widths(NamedTuple):
    """How many drafts of each request are made: those that texts give, or those that a head guesses."""

    of_texts: list[int]
    of_head: list[int]


class Tries:
    """When drafts of one sort are tried again where they do not pay, and until when nothing has to be chosen.

    sort: TEXTS or HEAD. follows: whether whoever guesses has to follow a request for a few steps before it is tried.
    """

    def __init__(self, sort: int, follows: bool) -> None:
        self.sort, self._follows, self.patience, self.last = sort, follows, PROBE_EVERY, 0
        self._without: tuple[int, int] | None = None  # rows, and what was noted, when none was worth it
        self._decided = self._num_without = 0  # in which step that was, and how many times on end

    @property
    def _pause(self) -> int:
        """Steps after which costs may say something else."""
        return max(RECONSIDERED, self.patience // 6)

    def rests_until(self) -> int:
        """The first step that is not surely like this one, in which it rests."""
        until = self._decided + self._pause + 1
        return until if self.sort == TEXTS else min(until, self.last + self.patience - TOLD_BEFORE)

    def are_near(self, now: int) -> bool:
        """Whether the next one comes in a few steps."""
        return now >= self.last + self.patience - TOLD_BEFORE

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
        """Whether, a few steps ago, none was worth it in such a step, and nothing was noted since. What texts say is
        another thing in each step."""
        if self._without != (rows, num_noted) or now > self._decided + self._pause:
            return False
        return self.sort == HEAD or self._num_without >= WITHOUT


class WidthChoice:
    """Decides how many drafts the requests of a step have, where as many are made as pay.

    depths: the most of one request. follows: whether the head has to follow a request for a few steps before it is
    tried.
    """

    def __init__(self, depths: int, follows: bool = False) -> None:
        self._depths, self._everybody, self._costs = depths, Acceptance(depths), CostTable()
        self._tries = Tries(TEXTS, False), Tries(HEAD, follows)
        self._num_steps = self._last_timed = 0
        self._gain = 1.0  # times as many tokens a second as without drafts, as it was expected last
        self._num_noted = [0, 0]  # changes of what is known of drafts, by sort
        self._tried: Acceptance | None = None  # whose guesses by the head are tried, and since when
        self._tried_since = 0

    def newcomer(self) -> Acceptance:
        """What is known of a new request's drafts."""
        made, self._num_noted = Acceptance(self._depths, self._everybody), [n + 1 for n in self._num_noted]
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
        return self._tries[sort].rest(rows, self._num_noted[sort], self._num_steps)

    def found_nothing(self, rows: int) -> None:
        """Notes that texts had no draft for a step."""
        self._tries[TEXTS].decide(True, rows, self._num_noted[TEXTS], self._num_steps)

    def is_due(self) -> bool:
        """Whether the head is to be tried again."""
        return self._num_steps >= self._tries[HEAD].last + self._tries[HEAD].patience or self._tried is not None

    def put_off(self) -> None:
        """Tries the head some steps later: now texts say something."""
        self._tries[HEAD].last, self._tried = self._num_steps + PROBE_EVERY - self._tries[HEAD].patience, None

    def num_quiet(self, sorts: Sequence[int]) -> int:
        """How many steps after this one, in which drafts of some sorts rest, are surely like it if the requests are."""
        return min(self._tries[sort].rests_until() for sort in sorts) - self._num_steps - 1

    def was_timed(self, rows: int) -> bool:
        """Whether such a step without drafts was timed a few steps ago."""
        return self.costs(rows).num_since(rows) + self._num_steps - self._last_timed < TIMED_AGAIN

    def is_to_be_timed(self, rows: int) -> bool:
        """Whether it is long ago that such a step without drafts was timed, which may cost less by now, and drafts do
        not gain so much that it hardly matters."""
        costs, since = self.costs(rows), self._num_steps - self._last_timed
        return not costs.is_sure(rows) or (self._gain < MUCH and costs.num_since(rows) + since > TIMED_EVERY)

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
        self._tries[TEXTS].decide(not any(of_texts), rows, self._num_noted[TEXTS], self._num_steps)
        if head:
            self._tries[HEAD].decide(not any(of_head), rows, self._num_noted[HEAD], self._num_steps)
            self._go_on_trying(seen, of_head)
        widths = self._better(seen, found, rows, head, Widths(of_texts, of_head))
        self._note_last(seen, widths)
        self._try(TEXTS, seen, [i for i, kinds in enumerate(found) if kinds], widths, rows, 0.0)
        if head:
            self._try(HEAD, seen, [i for i, kinds in enumerate(found) if not kinds], widths, rows, head.doubted)
        self._gain = self._expected_gain(seen, found, widths, rows, head)
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
        """Whether a request has guesses of the head, or may soon be given some to try."""
        return self._num_steps - seen.last[HEAD] < TOLD_AFTER or self._tries[HEAD].are_near(self._num_steps)

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
        sure ones would pay."""
        tries, now = self._tries[sort], self._num_steps
        if now < tries.last + tries.patience:
            return
        longest = min(able, key=lambda i: seen[i].last[sort], default=None)
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
        """Gives the request for which a head is tried two guesses in a few steps: in the first its weights are not in
        the cache, and one step says little about it."""
        if any(of_head):
            self._tries[HEAD].patience = PROBE_EVERY
        if self._tried is not None and self._num_steps >= self._tried_since + TRIED_FOR:
            self._tried = None
        if self._tried in seen:
            of_head[seen.index(self._tried)] = max(2, of_head[seen.index(self._tried)])

    def _expected_gain(
        self,
        seen: Sequence[Acceptance],
        found: Sequence[Sequence[str]],
        widths: Widths,
        rows: int,
        head: Guesser | None,
    ) -> float:
        """How many times as many tokens a second as without drafts are expected."""
        costs, tokens = self.costs(rows), float(rows)
        num_drafts = sum(widths.of_texts) + sum(widths.of_head)
        if not num_drafts:
            return 1.0
        for each, kinds, of_texts, of_head in zip(seen, found, *widths, strict=True):
            tokens += sum(each.hopes_for(kinds[:of_texts])) if of_texts else 0.0
            tokens += sum(each.hopes_of(head.name)[:of_head]) if head and of_head else 0.0
        seconds = costs.of(rows + num_drafts) + max(widths.of_head) * (head.seconds if head else 0.0)
        return tokens / seconds * costs.of(rows) / rows

    def note(self, seen: Acceptance, kinds: Sequence[str], num_right: int, sort: int = TEXTS) -> None:
        """Takes in of which kinds a request's drafts of the last step were, and how many were right."""
        self._num_noted[sort] += 1
        self._everybody.note(kinds, num_right)
        seen.note(kinds, num_right)
        if sort == TEXTS and num_right and self._tries[TEXTS].last == self._num_steps:
            seen.last[TEXTS] = self._tries[TEXTS].last = -LONG_AGO

    def time(self, requests: int, num_drafts: int, seconds: float) -> None:
        """Takes in how long a step of so many requests, each with one token and all with so many drafts, took."""
        num_steps, self._last_timed = max(1, self._num_steps - self._last_timed), self._num_steps
        if self._tried is not None and self._tried_since == self._num_steps:
            return
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
