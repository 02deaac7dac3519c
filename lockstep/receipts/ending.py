"""How an answer ends: its tokens are read once more, as they were when they were chosen."""

from dataclasses import replace
from typing import NamedTuple

from lockstep.engine.answer_tokens import NewDetokenizer, append_token
from lockstep.engine.request import Request, SamplingParams


class Ending(NamedTuple):
    """Where and why an answer ends. num_tokens: after which it ends, or all of them. reason: "stop" or "length"; None
    where nothing ends it. stop_reason: the token or string that stops it. text: of these tokens."""

    num_tokens: int
    reason: str | None
    stop_reason: int | str | None
    text: str


def ending(
    prompt_ids: list[int],
    output_ids: list[int],
    params: SamplingParams,
    eos_ids: frozenset[int],
    new_detokenizer: NewDetokenizer,
) -> Ending:
    """The Ending of an answer: end tokens, stop sequences and max_tokens are looked for after each token."""
    occurring = tuple(set(params.stop_token_ids).intersection(output_ids))  # of many, each token would be looked for
    request, reason = Request(0, prompt_ids, replace(params, stop_token_ids=occurring)), None
    for token in output_ids:
        reason = append_token(request, token, eos_ids, new_detokenizer)
        if reason is not None:
            break
    if request.answer is not None:
        request.answer.finish()
    return Ending(len(request.output_ids), reason, request.stop_reason, request.text)
