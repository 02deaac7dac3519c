"""Seconds of a step by its number of rows: averages of measured steps. A number of rows that was not measured is
assumed to be so costly that it is approached in small steps, and old measurements are forgotten."""

import itertools

LONG_AGO = 1 << 30  # steps
CHEAPEST = 0.02  # the least cost of a further row, as a share of a step: less is an error of measurement
BEND = 12  # how many further rows cost as much as the first row, before any was measured
FASTER, SLOWER = 0.3, 0.1  # weights of a faster and of a slower step in an average: other processes only slow a step
GUESS_GAIN = 0.15  # the weight of a measured guess in an average
DOUBTED = 1.25  # times the expected cost: a higher one is not believed before it was measured twice
CHANGED = 0.02  # the relative change of a cost that makes a new curve
DRAWN_FOR = 8  # steps in which such a change makes no new curve, since making one takes time
FORGET_AFTER = 256  # steps after which the cost of a number of rows has to be measured again


class StepCosts:
    """Seconds of a step by its number of rows, for one number of requests: averages of measured steps. faster, slower:
    the weights of a faster and of a slower step."""

    def __init__(self, faster: float = FASTER, slower: float = SLOWER) -> None:
        self._gains = slower, faster
        self._seconds: dict[int, float] = {}
        self._once: dict[int, float] = {}  # numbers of rows that were measured only once
        self._noted: dict[int, int] = {}  # {rows: the step in which they were measured last}
        self._num_steps, self._forgets_at = 0, FORGET_AFTER
        self._curve: list[float] = []  # [rows], made when it is needed from _drawn; empty: out of date
        self._drawn: dict[int, float] = {}
        self._drawn_at = 0  # the step in which it was made

    def __len__(self) -> int:
        """For how many different row counts a step was timed."""
        return len(self._noted)

    def note(self, rows: int, seconds: float, num_steps: int = 1) -> None:
        """Takes in a measured step. num_steps: steps since the last measured one, this one included."""
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
        """Forgets old measurements: where one was too high by chance, that number of rows would not be tried again."""
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
        """Steps since a step of this many rows was measured."""
        return self._num_steps - self._noted.get(rows, -LONG_AGO)

    def is_sure(self, rows: int) -> bool:
        """Whether steps of this many rows were measured more than once."""
        return rows in self._seconds

    def knows(self, rows: int) -> bool:
        """Whether a step of this many rows, or of fewer, was measured."""
        return any(n <= rows for n in self._noted)

    @property
    def reach(self) -> int:
        """The most rows that may be tried: a few more than were measured."""
        most = max(self._noted, default=0)
        return most + max(2, most // 4)

    def of(self, rows: int) -> float:
        """The expected seconds of a step of this many rows: at most those of a step of more rows (if such a step was
        faster, other processes slowed this one), and a little more than those of fewer; 1 if nothing was measured."""
        return self.up_to(rows)[rows]

    def up_to(self, rows: int) -> list[float]:
        """[n]: `of(n)`, for all n up to `rows` and perhaps more. The caller must not change the list."""
        if len(self._curve) <= rows:
            self._curve, self._drawn = self._made(max(rows, self.reach)), dict(self._seconds)
            self._drawn_at = self._num_steps
        return self._curve

    def _made(self, max_rows: int) -> list[float]:
        if not self._noted:
            return [1.0] * (max_rows + 1)
        if not self._seconds or not self._once:
            return curve(self._seconds or self._once, max_rows)
        expected = curve(self._seconds, max_rows)
        believed = {n: min(seconds, DOUBTED * expected[n]) for n, seconds in self._once.items()}
        return curve(self._seconds | believed, max_rows)


def curve(seconds: dict[int, float], max_rows: int) -> list[float]:
    """[rows], up to `max_rows`: the seconds of a step, interpolated and extrapolated from {rows: measured seconds}."""
    rows, least = sorted(seconds), []
    for n in reversed(rows):
        least.append(min([seconds[n], *least[-1:]]))
    least.reverse()
    costs = [least[0]] * (rows[0] + 1)
    for i, (low, high) in enumerate(itertools.pairwise(rows)):
        per_row = (least[i + 1] - least[i]) / (high - low)
        costs += [least[i] + per_row * (n - low) for n in range(low + 1, high + 1)]
    first, last = rows[0], rows[-1]
    costs = [max(cost, least[0] * (1 + CHEAPEST * (n - first))) for n, cost in enumerate(costs)]
    per_row = costs[-1] / (last + BEND)
    if len(rows) > 1:
        per_row = max(per_row, (least[-1] - least[-2]) / (last - rows[-2]))
    return costs + [costs[-1] + per_row * (n - last) for n in range(last + 1, max_rows + 1)]


class CostTable:
    """The StepCosts of each number of requests; similar numbers share one."""

    def __init__(self) -> None:
        self._groups: dict[int, StepCosts] = {}

    def among(self, requests: int) -> StepCosts:
        """The StepCosts of steps with this many requests."""
        group = requests if requests <= 4 else 2 + requests.bit_length()  # 5 to 7, 8 to 15, ...
        costs = self._groups.get(group)
        if costs is None:
            costs = self._groups[group] = StepCosts()
        return costs
