"""How many drafts pay: what they cost, by measured steps, against how often they were right.

Only speed follows from this, and so may follow a clock.
"""

from collections.abc import Sequence

KEPT = 0.85  # of an average, when a new value comes
FIRST_GUESS = 0.5  # that a draft is right, before any was seen
DEARER = 0.06  # of a step of one row, for each further row, before any was measured
FRESH = 128  # steps after which a measured number of rows that did not come again is forgotten
PROBE_EVERY = 24  # tokens of a request without drafts, after which one is tried again


class Acceptance:
    """How often the draft at each depth is right, if those before it were, by where it comes from.

    before: that of others, with which this one begins.
    """

    def __init__(self, depths: int, before: "Acceptance | None" = None) -> None:
        self._depths = depths
        self.rates = {source: list(rates) for source, rates in before.rates.items()} if before else {}
        self.num_without = 0  # tokens since the last draft

    def of(self, source: str) -> list[float]:
        """[depth]: how often a draft from there is right."""
        return self.rates.setdefault(source, [FIRST_GUESS] * self._depths)

    def note(self, sources: Sequence[str], num_right: int) -> None:
        """Takes in a step with drafts, by where each came from; those after the first wrong one say nothing."""
        for depth, source in enumerate(sources[: num_right + 1]):
            rates = self.of(source)
            rates[depth] = KEPT * rates[depth] + (1 - KEPT) * (depth < num_right)

    def expected(self, sources: Sequence[str]) -> list[float]:
        """[k]: tokens that the first k of these drafts give beside the certain one, on average."""
        total, survives, made = 0.0, 1.0, [0.0]
        for depth, source in enumerate(sources):
            survives *= self.of(source)[depth]
            total += survives
            made.append(total)
        return made


class StepCosts:
    """Seconds of a step by its rows, an average of what was measured in the last FRESH steps.

    What was measured long ago is forgotten: where it was too much, by chance, steps of so many rows would never be
    tried again.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._noted: dict[int, int] = {}  # by rows: when they were measured last, in steps
        self._num_steps = 0

    def __len__(self) -> int:
        """How many numbers of rows were measured."""
        return len(self._seconds)

    def note(self, rows: int, seconds: float) -> None:
        """Takes in a step."""
        before = self._seconds.get(rows)
        # a step may be held up by others: what is far slower than usual counts little
        seconds = seconds if before is None else min(seconds, 2 * before)
        self._seconds[rows] = seconds if before is None else KEPT * before + (1 - KEPT) * seconds
        self._num_steps += 1
        self._noted[rows] = self._num_steps
        if self._num_steps % FRESH == 0:
            for old in [n for n, at in self._noted.items() if at <= self._num_steps - FRESH]:
                del self._seconds[old], self._noted[old]

    def of(self, rows: int) -> float:
        """Seconds that a step of so many rows may take, 1 if none was ever measured: at least that of fewer rows."""
        if rows in self._seconds:
            return self._seconds[rows]
        below = max((n for n in self._seconds if n < rows), default=None)
        above = min((n for n in self._seconds if n > rows), default=None)
        if below is None:
            return 1.0 if above is None else self._seconds[above] / (1 + DEARER * (above - rows))
        if above is None:
            return self._seconds[below] * (1 + DEARER * (rows - below))
        share = (rows - below) / (above - below)
        return self._seconds[below] * (1 - share) + max(self._seconds[below], self._seconds[above]) * share


def best_width(
    expected: Sequence[float], costs: StepCosts, rows: int, tokens: float, seconds: Sequence[float] | None = None
) -> int:
    """How many drafts give the most tokens a second.

    expected: for each number of them, see Acceptance. rows, tokens: what the step has and gives without them. seconds:
    what so many guesses take themselves, before the step; None: nothing.
    """
    taken = seconds or [0.0] * len(expected)
    return max(range(len(expected)), key=lambda k: (tokens + expected[k]) / (costs.of(rows + k) + taken[k]))
