"""What steps cost, by their rows: averages of what was measured. Whatever was not is taken to be dear enough to be
tried in small steps, and what was measured long ago is forgotten."""

import itertools

LONG_AGO = 1 << 30  # steps
CHEAPEST = 0.02  # of a step, for each further row: less is an error of measurement, or others' doing
BEND = 12  # further rows that cost as much as the first, before any was measured
FASTER, SLOWER = 0.3, 0.1  # what a quicker step moves an average, and a slower one: others on the machine only slow it
GUESS_GAIN = 0.15  # what a measured guess moves an average
DOUBTED = 1.25  # times what was expected: more is not believed before it was seen twice
CHANGED = 0.02  # of a cost, from which others follow
DRAWN_FOR = 8  # steps, in which a small change counts for nothing: to draw the curve takes a while
FORGET_AFTER = 256  # steps, after which what a number of rows cost has to be found out again


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
        self._drawn_at = 0

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
            is_moved = abs(after - self._drawn.get(rows, 0.0)) > CHANGED * after
            if is_moved and self._num_steps >= self._drawn_at + DRAWN_FOR:
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

    def is_sure(self, rows: int) -> bool:
        """Whether a step of so many rows was measured more than once."""
        return rows in self._seconds

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
        return self.up_to(rows)[rows]

    def up_to(self, rows: int) -> list[float]:
        """[n]: the same of all n, up to so many rows at least. It is the costs' own."""
        if len(self._curve) <= rows:
            self._curve, self._drawn = self._made(max(rows, self.reach)), dict(self._seconds)
            self._drawn_at = self._num_steps
        return self._curve

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
