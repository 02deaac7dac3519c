"""`continue_from`: the token ids with which answers begin, from which they go on as if nothing had come between."""

from typing import TYPE_CHECKING, Any

from lockstep.serve.answer_size import Prompts
from lockstep.serve.continuation import ANEW, FIELD, Continuation
from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import Fields, Items, shown
from lockstep.serve.fields.prompts import check_ids
from lockstep.serve.fields.seed import has_seed

if TYPE_CHECKING:
    from lockstep.serve.service import Service


class ContinueFields(Fields):
    """The token ids of the only choice, or an array of them for each choice, in the order of their index."""

    continue_from: Items[Any] | None = None


def continuation(service: "Service", fields, prompts: Prompts) -> Continuation:
    """The Continuation that a request asks for, by SamplingFields, StreamFields and perhaps ContinueFields. ApiError
    400 for what are no token ids, for another number of choices, and without a seed where one is drawn.

    A stream brings only what is new, so that nothing else needs log-probabilities.
    """
    given = getattr(fields, FIELD, None)
    lists = _lists(service, given, sum(params.n for _, params in prompts)) if given else []
    if not any(lists):
        return ANEW
    params = prompts[0][1]
    if params.temperature > 0 and not has_seed(fields.seed):
        raise wrong_field(FIELD, "expected the seed of the answer that goes on, too: without it other noise is drawn")
    if getattr(fields, "is_empty", False):
        raise wrong_field(FIELD, "expected none with max_tokens 0")
    of_prompts, first = [], 0
    for _, each in prompts:
        of_prompts.append(lists[first : first + each.n])
        first += each.n
    return Continuation(of_prompts, params.logprobs is not None and not fields.stream)


def _lists(service: "Service", given: list, num_choices: int) -> list[list[int]]:
    """The token ids of each choice."""
    lists = given if any(isinstance(each, list) for each in given) else [given]
    if len(lists) != num_choices:
        got = f"an array of {len(lists)}" if lists is given else "token ids of one"
        raise wrong_field(FIELD, f"expected an array with token ids of each of {num_choices} choices, got {got}")
    for number, ids in enumerate(lists):
        if not isinstance(ids, list):
            raise wrong_field(f"{FIELD}[{number}]", f"expected an array of token ids, got {shown(ids)}")
    return [check_ids(service, ids, FIELD) for ids in lists]
