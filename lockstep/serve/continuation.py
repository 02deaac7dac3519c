"""The tokens with which a request's answers begin, from which they go on; see the field `continue_from`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from lockstep.engine.answer_tokens import NotItsAnswer
from lockstep.serve.errors import wrong_field

T = TypeVar("T")
FIELD = "continue_from"


class Continuation(NamedTuple):
    """How answers begin. output_ids: for each prompt, the token ids of each of its samples; empty: all begin anew.
    recompute_logprobs: whether the log-probabilities of these tokens are computed."""

    output_ids: Sequence[Sequence[Sequence[int]]] = ()
    recompute_logprobs: bool = False

    @property
    def num_tokens(self) -> int:
        """The number of all tokens."""
        return sum(len(ids) for samples in self.output_ids for ids in samples)


ANEW = Continuation()


def refusing(narrowing: Sequence[str], submit: Callable[..., T], *args: Any, **options: Any) -> T:
    """Calls a function that makes requests. ApiError 400 for tokens that cannot be the beginning of their answers.

    narrowing: the fields of the request that forbid tokens, see `token_masks.narrowing_fields`.
    """
    try:
        return submit(*args, **options)
    except NotItsAnswer as error:
        masking = [name for name in narrowing if name not in ("suppress_tokens", "min_tokens")] or ["its form"]
        raise wrong_field(FIELD, error.reason.replace("logits_mask", " and ".join(masking))) from None
