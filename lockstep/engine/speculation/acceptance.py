"""How often drafts were right: by source and by depth, for one request and for all requests."""

import itertools
import operator
from collections.abc import Sequence, Set

FIRST_GUESS = 0.5  # the rate of right drafts, before any draft was seen
PRIOR = 1  # the number of seen drafts for which FIRST_GUESS counts
FORCED = "grammar"  # the source of drafts that a grammar forces: constrained decoding allows no other token
LEAST_GAIN = 0.1  # the least weight of a new value in an average of one request
LEAST_GAIN_OF_ALL = 0.03  # the same in an average of all requests
OWN_AFTER = 4  # steps with drafts of a request, after which its own rates count and no longer those of all requests


class Rates:
    """rates: [depth], how often drafts of one source were right, if all drafts before them were. counts: [depth], how
    many such drafts were seen. least_gain: the least weight of a new value."""

    def __init__(self, rates: list[float], counts: list[int], least_gain: float) -> None:
        self.rates, self._counts, self._least_gain = rates, counts, least_gain

    def note(self, depth: int, is_right: bool) -> None:
        """Takes in whether a draft was right. A depth that was not seen yet has the rate of the depth before it."""
        gain = max(self._least_gain, 1 / (self._counts[depth] + PRIOR + 1))
        self.rates[depth] += gain * (is_right - self.rates[depth])
        self._counts[depth] += 1
        for deeper in range(depth + 1, len(self.rates)):
            if self._counts[deeper]:
                break
            self.rates[deeper] = self.rates[depth]

    def of_one(self) -> "Rates":
        """A copy for one request, in which new values have more weight."""
        return Rates(list(self.rates), [min(count, OWN_AFTER) for count in self._counts], LEAST_GAIN)


class Acceptance:
    """How often the draft at each depth is right, if all drafts before it were, by source: of one request, or of all.

    everybody: the Acceptance of all requests, which counts until enough was seen of this request; None: this is it.
    """

    def __init__(self, depths: int, everybody: "Acceptance | None" = None) -> None:
        self._depths, self._everybody = depths, everybody
        self._rates: dict[str, Rates] = {}
        self._num_seen: dict[str, int] = {}
        self.last = [0, 0]  # by sort (TEXTS, HEAD): the number of the last step with a draft of this sort

    def of(self, source: str) -> list[float]:
        """[depth]: how often a draft of a source is right."""
        return self.rates_of(source).rates

    def rates_of(self, source: str) -> Rates:
        """The Rates of drafts of a source."""
        rates = self._rates.get(source)
        if rates is None and self._everybody is not None:
            return self._everybody.rates_of(source)
        if rates is None:
            rates = Rates([FIRST_GUESS] * self._depths, [0] * self._depths, LEAST_GAIN_OF_ALL)
            self._rates[source] = rates
        return rates

    def note(self, sources: Sequence[str], num_right: int) -> None:
        """Takes in the drafts of a step by their sources, of which the first num_right were right. Drafts after the
        first wrong one say nothing. The Acceptance of all requests must have them already.
        """
        for depth, source in enumerate(sources[: num_right + 1]):
            if self._everybody is None or source in self._rates:
                self.rates_of(source).note(depth, depth < num_right)
        if self._everybody is not None and sources:
            count = self._num_seen[sources[0]] = self._num_seen.get(sources[0], 0) + 1
            if count == OWN_AFTER:
                self._rates[sources[0]] = self.rates_of(sources[0]).of_one()

    def hopes(self, but_of: str | None = None) -> list[float]:
        """[depth]: the probability that a draft and all drafts before it are right, with the best source at each depth;
        the source but_of is left out, and so are drafts that a grammar forces, which are always right."""
        sources = [source for source in self.sources if source not in (FORCED, but_of)]
        rates_of = [self.of(source) for source in sources] or [[FIRST_GUESS] * self._depths]
        survival, hopes = 1.0, []
        for rates in zip(*rates_of, strict=True) if len(rates_of) > 1 else ((rate,) for rate in rates_of[0]):
            survival *= max(rates)
            hopes.append(survival)
        return hopes

    def hopes_of(self, source: str) -> list[float]:
        """[depth]: the probability that a draft and all drafts before it are right, all of one source."""
        return list(itertools.accumulate(self.of(source), operator.mul))

    def hopes_for(self, sources: Sequence[str]) -> list[float]:
        """[depth]: the probability that a draft and all drafts before it are right, whose sources are given."""
        survival, hopes, last, rates = 1.0, [], "", []
        for depth, source in enumerate(sources):
            if source != last:
                last, rates = source, self.of(source)
            survival *= rates[depth]
            hopes.append(survival)
        return hopes

    @property
    def sources(self) -> Set[str]:
        """The sources of which drafts were seen, of this request or of all."""
        return self._rates.keys() | self._everybody.sources if self._everybody is not None else self._rates.keys()
