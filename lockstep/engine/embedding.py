"""Requests that choose no token: a Reader takes in their last hidden states, after the final norm. A Pool makes an
embedding of them."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

POOLINGS = ("last", "mean")


class Reader(Protocol):
    """Takes in the hidden states of a request's tokens as steps compute them. A preempted request computes its tokens
    again, but gives each state once."""

    @property
    def needs_only_last(self) -> bool:
        """Whether the hidden state of the last token is the only one that is still needed."""
        ...

    @property
    def is_finite(self) -> bool:
        """Whether all hidden states that were taken in are finite; if not, the request fails at its end."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether no further hidden state is of use, so that the request can end before its last token."""
        ...

    def rows(self, start: int, end: int) -> Sequence[int]:
        """The rows of a step on tokens start .. end whose hidden states are needed, counted from start."""
        ...

    def take(self, hidden_ED: np.ndarray) -> None:
        """Takes in the hidden states of the rows that `rows` gave: float32 [E, D]."""
        ...


class Pool:
    """A Reader that makes one vector of a prompt's hidden states.

    pooling: "last": the hidden state of the last token; "mean": the mean over all tokens, summed in float64 in the
    order of their positions; all tokens are computed, since the prefix cache has no hidden states. Neither depends on
    how steps cut the prompt.
    """

    def __init__(self, pooling: str, num_tokens: int) -> None:
        self.pooling, self.num_tokens, self._num_taken = pooling, num_tokens, 0
        self._sum = np.zeros((), np.float64)  # [D] from the first row on

    @property
    def needs_only_last(self) -> bool:
        """Whether the hidden state of the last token is the only one that is still needed."""
        return self.pooling == "last" or self._num_taken == self.num_tokens - 1

    @property
    def is_finite(self) -> bool:
        """Whether all hidden states that were taken in are finite."""
        return bool(np.isfinite(self._sum).all())

    @property
    def has_ended(self) -> bool:
        """Never: each pooling needs the last token."""
        return False

    def rows(self, start: int, end: int) -> range:
        """The rows of a step on tokens start .. end whose hidden states are needed, counted from start."""
        first = self.num_tokens - 1 if self.pooling == "last" else self._num_taken
        return range(max(first, start) - start, end - start)

    def take(self, hidden_ED: np.ndarray) -> None:
        """Takes in the hidden states of the rows that `rows` gave: float32 [E, D]."""
        with np.errstate(invalid="ignore"):  # NaNs of a broken model: `is_finite` reports them
            for row in hidden_ED:
                self._sum = self._sum + row
        self._num_taken += len(hidden_ED)

    def embedding(self, normalize: bool = True) -> np.ndarray:
        """The vector, float32 [D]. normalize: to length 1, by the exact sum of squares; a zero vector stays zero."""
        mean = self._sum / self._num_taken
        length = math.sqrt(math.fsum(mean * mean)) if normalize else 0.0
        return (mean / (length or 1.0)).astype(np.float32)
