"""Masks of tokens that may be asked about drafts."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np


class SpeculativeMask(ABC):
    """A `SamplingParams.logits_mask` that may be asked about tokens that are not final: requests with one draft.

    output_ids: the answer so far, a list that only grows. drafts: tokens that are taken to follow it, none of which
    ends it. What was asked about drafts changes nothing of what is said later.
    """

    @abstractmethod
    def __call__(self, output_ids: list[int]) -> np.ndarray | None:
        """The tokens allowed next, see SamplingParams."""

    @abstractmethod
    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray | None]:
        """The tokens allowed after the answer, then those after each of the drafts, from those after the first `first`
        drafts on; fewer if a draft is not allowed, or if it cannot be said what may follow it. Each array may be used
        again by the next. What `__call__` would raise is raised."""

    @abstractmethod
    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        """Tokens that have to follow the drafts, as far as that is cheap to know. ValueError if a limit is reached."""

    @abstractmethod
    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        """How many drafts there are before the first that is not allowed. ValueError if a limit is reached."""
