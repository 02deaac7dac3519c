"""What is new of a request, on its way from a replica to the front.

A replica notes how much of each list of a request it has sent (Sent). The front takes in tokens by their index, through
the same `append_token` as an engine: its request is at any time the beginning of the answer, with text.
"""

import time

from lockstep.engine.answer_tokens import append_token
from lockstep.engine.leaves import LEAF_BYTES, Leaves
from lockstep.engine.making import KnownAnswer, RequestMaker
from lockstep.engine.request import Request
from lockstep.engine.sampling import NothingAllowed, Refused
from lockstep.replicas.messages import Ending, Update


class Sent:
    """How much of a request the front knows. request: of the replica's engine."""

    def __init__(self, number: int, request: Request) -> None:
        self.number, self.request = number, request
        self._tokens, self._logprobs = len(request.output_ids), len(request.logprobs)
        self._prompt_logprobs = len(request.prompt_logprobs)
        leaves = request.leaves
        self._leaves, self._prompt_leaves = (0, 0) if leaves is None else (len(leaves.answer), len(leaves.prompt))

    def update(self) -> Update:
        """What is new since the last call."""
        request, leaves = self.request, self.request.leaves
        new_leaves = None
        if leaves is not None:
            answer, prompt = bytes(leaves.answer[self._leaves :]), bytes(leaves.prompt[self._prompt_leaves :])
            new_leaves = self._leaves, answer, self._prompt_leaves, prompt
            self._leaves, self._prompt_leaves = len(leaves.answer), len(leaves.prompt)
        made = Update(
            number=self.number,
            first_token=self._tokens,
            output_ids=request.output_ids[self._tokens :],
            first_logprob=self._logprobs,
            logprobs=request.logprobs[self._logprobs :],
            top_logprobs=request.top_logprobs[self._logprobs :],
            first_prompt_logprob=self._prompt_logprobs,
            prompt_logprobs=request.prompt_logprobs[self._prompt_logprobs :],
            prompt_top_logprobs=request.prompt_top_logprobs[self._prompt_logprobs :],
            leaves=new_leaves,
            seconds_since_admission=None if request.admitted is None else time.monotonic() - request.admitted,
            num_cached=request.num_cached,
            num_drafted=request.num_drafted,
            num_accepted=request.num_accepted,
            ending=None if request.finish_reason is None else _ending(request, request.finish_reason),
        )
        self._tokens, self._logprobs = len(request.output_ids), len(request.logprobs)
        self._prompt_logprobs = len(request.prompt_logprobs)
        return made


def _ending(request: Request, reason: str) -> Ending:
    refused, error = None, request.refused
    if error is not None:
        refused = str(error), str(error.__cause__) if isinstance(error.__cause__, ValueError) else None
    return Ending(
        finish_reason=reason,
        stop_reason=request.stop_reason,
        error=request.error,
        is_fault=request.is_fault,
        refused=refused,
        is_nothing_allowed=isinstance(error, NothingAllowed),
        pool=request.pool,
    )


def known_answer(request: Request) -> KnownAnswer:
    """What the front knows of a request's answer."""
    leaves = request.leaves
    return KnownAnswer(
        output_ids=list(request.output_ids),
        logprobs=list(request.logprobs),
        top_logprobs=list(request.top_logprobs),
        prompt_logprobs=list(request.prompt_logprobs),
        prompt_top_logprobs=list(request.prompt_top_logprobs),
        leaves=None if leaves is None else (bytes(leaves.answer), bytes(leaves.prompt)),
        computes_given=request.computes_given,
    )


class Differing(RuntimeError):
    """A replica's answer is not the one that the front reads in its tokens: one of the two computes wrongly."""


def take(request: Request, update: Update, maker: RequestMaker, num_moves: int) -> None:
    """Adds what is new to the front's request. num_moves: how many replicas had it before. Differing where tokens end
    the answer here and not there."""
    ends = None
    for token in update.output_ids[max(0, len(request.output_ids) - update.first_token) :]:
        if ends is not None:
            raise Differing(f"the answer ends ({request.stop_reason!r}) before token {len(request.output_ids)}")
        ends = append_token(request, token, maker.eos_ids, maker.new_detokenizer)
    skip = len(request.logprobs) - update.first_logprob
    request.logprobs += update.logprobs[skip:]
    request.top_logprobs += update.top_logprobs[skip:]
    skip = len(request.prompt_logprobs) - update.first_prompt_logprob
    request.prompt_logprobs += update.prompt_logprobs[skip:]
    request.prompt_top_logprobs += update.prompt_top_logprobs[skip:]
    if request.leaves is not None and update.leaves is not None:
        _take_leaves(request.leaves, *update.leaves)
    if request.admitted is None and update.seconds_since_admission is not None:
        request.admitted, request.num_cached = time.monotonic() - update.seconds_since_admission, update.num_cached
    if not num_moves:  # guesses of a replica that was lost are not known
        request.num_drafted, request.num_accepted = update.num_drafted, update.num_accepted
    if update.ending is not None:
        _end(request, update.ending)
    elif ends is not None:
        raise Differing(f"the answer ends ({request.stop_reason!r}) at token {len(request.output_ids)}")


def _take_leaves(leaves: Leaves, first: int, answer: bytes, first_prompt: int, prompt: bytes) -> None:
    leaves.answer += answer[len(leaves.answer) - first :]
    leaves.prompt += prompt[len(leaves.prompt) - first_prompt :]
    assert len(leaves.answer) % LEAF_BYTES == 0, len(leaves.answer)


def _end(request: Request, ending: Ending) -> None:
    if request.answer is not None and ending.finish_reason != "cancelled" and request.ends_as is None:
        request.answer.finish()
    if ending.finish_reason == "stop" and request.stop_reason != ending.stop_reason:
        raise Differing(f"the answer ends by {request.stop_reason!r} and not by {ending.stop_reason!r}")
    request.stop_reason, request.error, request.is_fault = ending.stop_reason, ending.error, ending.is_fault
    if ending.refused is not None:
        request.refused = _refused(*ending.refused, ending.is_nothing_allowed)
    if ending.pool is not None:
        request.pool = ending.pool
    request.finish_reason = ending.finish_reason


def _refused(message: str, cause: str | None, is_nothing_allowed: bool) -> Refused:
    made = NothingAllowed() if is_nothing_allowed else Refused(message)
    made.__cause__ = None if cause is None else ValueError(cause)
    return made
