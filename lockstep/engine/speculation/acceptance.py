"""How often drafts were right: by where they come from and by depth, of one request and of all."""

import itertools
import operator
from collections.abc import Sequence, Set

FIRST_GUESS = 0.5  # that a draft is right, before any was seen; it counts for so many seen ones:
PRIOR = 1
FORCED = "grammar"  # the source of drafts that nothing else may stand for
LEAST_GAIN, LEAST_GAIN_OF_ALL = 0.1, 0.03  # of an average, that a new value has: of a request, of all requests
OWN_AFTER = 4  # drafts of a request, after which what was seen of it counts, and not what was seen of all


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
