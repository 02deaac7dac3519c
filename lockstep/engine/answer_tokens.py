"""The tokens of an answer: how one is taken in, and how an answer goes on from tokens that are already known.

A request whose answer is resumed is like one that was preempted: its known tokens are computed again, and everything
that looks at an answer (penalties, masks, min_tokens, stop strings, the text, the position of the noise) finds the
answer where it was. For this the known tokens are taken in one by one, as new ones are. If they were appended to the
prompt instead, all of this would begin anew, and the answer would go on differently.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lockstep.engine.answer_text import AnswerText, Detokenizer
from lockstep.engine.request import Request, token_list
from lockstep.engine.sampling import Refused, adjustment_of

Ends = frozenset[int]
NewDetokenizer = Callable[[Request], Detokenizer] | None


class NotItsAnswer(ValueError):
    """Tokens that cannot be the beginning of a request's answer. reason: what is wrong with them."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"output_ids: {reason}")
        self.reason = reason


def append_token(request: Request, token: int, eos_ids: Ends, new_detokenizer: NewDetokenizer) -> str | None:
    """Adds a token to a request's answer and its text; returns the finish_reason if the answer ends with it, and notes
    the stop_reason. eos_ids, new_detokenizer: see `Engine`."""
    p, stop_string = request.params, None
    request.output_ids.append(token)
    is_end = token in p.stop_token_ids or (token in eos_ids and not p.ignore_eos)
    if new_detokenizer is not None:
        if request.answer is None:
            request.answer = AnswerText(new_detokenizer(request), p)
        stop_string = request.answer.push(token, is_end)
    if is_end or stop_string is not None:
        request.stop_reason = token if stop_string is None else stop_string
        return "stop"
    return "length" if len(request.output_ids) >= p.max_tokens else None


def given_lists(output_ids: Iterable[Any], num_samples: int) -> list[list[int]]:
    """The known tokens of each sample. output_ids: of the only sample, or a list for each. NotItsAnswer for anything
    else."""
    try:
        listed = list(output_ids)
    except TypeError:
        raise NotItsAnswer(f"expected a list of token ids, got {output_ids!r:.80}") from None
    if not listed:
        return [[] for _ in range(num_samples)]
    lists = listed if any(isinstance(each, Iterable) for each in listed) else [listed]
    if len(lists) != num_samples:
        raise NotItsAnswer(f"expected a list of token ids for each of {num_samples} samples, got {len(lists)}")
    return [token_list(each, "output_ids") for each in lists]


def resume_all(requests: Sequence[Request], output_ids: Iterable[Any], *rest: Any) -> None:
    """`resume` for the samples of a prompt whose tokens are known. output_ids: see `given_lists`."""
    for number, (request, token_ids) in enumerate(zip(requests, given_lists(output_ids, len(requests)), strict=True)):
        try:
            if token_ids:
                resume(request, token_ids, *rest)
        except NotItsAnswer as error:
            raise NotItsAnswer(f"sample {number}: {error.reason}") if len(requests) > 1 else error from None


def resume(
    request: Request,
    token_ids: list[int],
    eos_ids: Ends,
    new_detokenizer: NewDetokenizer,
    vocab_size: int,
    recompute_logprobs: bool,
) -> None:
    """Begins a new request's answer with known tokens. If they end it, the request has ended, or ends as soon as the
    log-probabilities that it asks for are computed. NotItsAnswer if the request can have no such answer.

    recompute_logprobs: whether the log-probabilities of these tokens are computed anew; else they are NaN.
    """
    p = request.params
    if p.pooling is not None:
        raise NotItsAnswer("expected none with pooling, an embedding has no answer")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        got = f"{min(token_ids)} to {max(token_ids)}"
        raise NotItsAnswer(f"token ids must be 0 to {vocab_size - 1}, got {got}")
    if len(token_ids) > p.max_tokens:
        raise NotItsAnswer(f"expected at most max_tokens, {p.max_tokens}, got {len(token_ids)} tokens")
    reason = None
    for number, token in enumerate(token_ids):
        if reason is not None:
            raise NotItsAnswer(f"the answer ends ({request.stop_reason!r}) before its token {number}, {token}")
        _check_allowed(request, number, token, eos_ids, vocab_size)
        reason = append_token(request, token, eos_ids, new_detokenizer)
    request.num_given = len(token_ids)
    if reason is not None and request.answer is not None:
        request.answer.finish()
    request.num_given_characters = len(request.text)
    if recompute_logprobs:
        request.computes_given = request.has_given_rows = True
    else:
        request.logprobs = [math.nan] * len(token_ids)
        request.top_logprobs = [{} for _ in token_ids] if p.logprobs else []
    if request.is_reported:
        request.finish_reason = reason
    else:
        request.ends_as = reason


def _check_allowed(request: Request, number: int, token: int, eos_ids: Ends, vocab_size: int) -> None:
    """NotItsAnswer if the request could not have chosen a token after its answer so far."""
    if not request.is_adjusted:
        return
    try:
        forbidden_by = adjustment_of(request, eos_ids, vocab_size).forbidden_by(request.output_ids, token)
    except Refused as error:
        raise NotItsAnswer(f"before token {number}, {token}: {error}") from None
    if forbidden_by is not None:
        raise NotItsAnswer(f"token {number}, {token}, is not allowed there by {forbidden_by}")
