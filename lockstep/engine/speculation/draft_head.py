"""What a Drafter needs of a model that guesses, such as an MTP head or a smaller model."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lockstep.engine.request import Request


class Head(Protocol):
    """A model that guesses, for all requests of a step together. name: what its drafts are counted under, and judged
    by."""

    name: str

    @property
    def may_rest(self) -> bool:
        """Whether `guess` need not be called in this step if nothing is wanted."""
        ...

    def wants_hidden(self, request: Request) -> bool:
        """Whether `observe` is to be told the hidden states of a request's tokens."""
        ...

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """After a step: takes in the last hidden states of a request's tokens from position `start` on, float32 [n, D];
        they are overwritten by the next step."""
        ...

    def ready(self, request: Request, most: int) -> int:
        """How many drafts a request may have, up to `most`."""
        ...

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """Before every step: {id of a request: guesses of its next tokens}, for each at most as many as wanted; 0: it
        has yet to be read. num_planned: tokens that the model computes in this step."""
        ...

    def is_behind(self, request: Request) -> bool:
        """Whether a request has yet to be read, so that it got no guess."""
        ...

    def seconds(self, num_requests: int) -> float:
        """Seconds that one more guess for each of so many requests takes; 0 before any was measured."""
        ...

    def forget(self, request: Request) -> None:
        """Gives back what a request has here; it may come again."""
        ...
