"""Logits masks for speculative decoding: they can be asked about draft tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np


class SpeculativeMask(ABC):
    """A `SamplingParams.logits_mask` that can also be asked about drafts, so that requests with it may have drafts.

    output_ids: the answer so far, a list that only grows. drafts: tokens that may come next, no end token among them. A
    question about drafts does not change later answers of the mask.
    """

    @abstractmethod
    def __call__(self, output_ids: list[int]) -> np.ndarray | None:
        """The tokens allowed next, see SamplingParams."""

    @abstractmethod
    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray | None]:
        """Yields the tokens allowed after the answer and its first n drafts, for n = first, first + 1, ... len(drafts).

        It ends early after a draft that is not allowed, or where a limit is reached. The next array may overwrite the
        one before. Raises whatever `__call__` would raise for output_ids.
        """

    @abstractmethod
    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        """The tokens that must follow the drafts, as many as are cheap to find. ValueError if a limit is reached."""

    @abstractmethod
    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        """The number of drafts before the first that is not allowed. ValueError if a limit is reached."""
