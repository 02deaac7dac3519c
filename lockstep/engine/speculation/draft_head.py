"""Head: what a Drafter needs of a model that guesses, such as an MTP head or a draft model."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lockstep.engine.request import Request


class Head(Protocol):
    """A model that guesses for all requests of a step at once. name: the source under which its drafts are counted."""

    name: str

    @property
    def may_rest(self) -> bool:
        """Whether `guess` may be left out in a step in which no guess is wanted."""
        ...

    def wants_hidden(self, request: Request) -> bool:
        """Whether the head needs the hidden states of a request's tokens, see `observe`."""
        ...

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """After a step: takes in the last hidden states of a request's tokens from position `start` on, float32 [n, D];
        the next step overwrites them."""
        ...

    def ready(self, request: Request, max_drafts: int) -> int:
        """How many drafts the head can give a request in this step, up to `max_drafts`."""
        ...

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """Before a step: {id of a request: guesses of its next tokens}, at most as many as wanted: [(request,
        max_drafts), ...]. A request with max_drafts 0 gets none; the head may compute its known tokens for later
        guesses. num_planned: how many tokens the model computes in this step."""
        ...

    def is_behind(self, request: Request) -> bool:
        """Whether the head has yet to compute known tokens of a request, so that it could not guess."""
        ...

    def seconds(self, num_requests: int) -> float:
        """Seconds that one more guess for each of num_requests requests takes; 0 before any was measured."""
        ...

    def forget(self, request: Request) -> None:
        """Gives back the memory that the head has for a request; the request may come again."""
        ...
