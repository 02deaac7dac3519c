"""Planted mistakes of resuming: the proof must find each of them, or it would show nothing.

Each function takes a pytest.MonkeyPatch and puts one mistake into the engine. Answers that begin anew do not change.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lockstep.engine import answer_tokens, sampling
from lockstep.engine.answer_text import AnswerText
from lockstep.engine.request import Request
from lockstep.engine.sampling import Adjustment
from lockstep.text.stop_strings import StopStrings


def after_resuming(patch: pytest.MonkeyPatch, change: Callable[[Request, Any], None]) -> None:
    """Calls `change` with each resumed request and the function that makes detokenizers."""
    resume = answer_tokens.resume

    def changed(request: Request, token_ids: list[int], eos_ids: Any, new_detokenizer: Any, *rest: Any) -> None:
        resume(request, token_ids, eos_ids, new_detokenizer, *rest)
        change(request, new_detokenizer)

    patch.setattr(answer_tokens, "resume", changed)


def one_token_fewer(patch: pytest.MonkeyPatch) -> None:
    """The answer goes on after the second token instead of the first, and so on."""
    resume = answer_tokens.resume
    patch.setattr(
        answer_tokens, "resume", lambda request, token_ids, *rest: resume(request, token_ids[1:] or token_ids, *rest)
    )


def one_token_too_many(patch: pytest.MonkeyPatch) -> None:
    """The last token is taken in twice."""
    resume = answer_tokens.resume
    patch.setattr(answer_tokens, "resume", lambda r, token_ids, *rest: resume(r, [*token_ids, token_ids[-1]], *rest))


def mask_not_replayed(patch: pytest.MonkeyPatch) -> None:
    """Masks see the tokens after the seam only."""

    def forget(request: Request, new_detokenizer: Any) -> None:
        mask, rest, num_given = request.params.logits_mask, [], request.num_given

        def of_rest(output_ids: list[int]) -> Any:
            rest.extend(output_ids[num_given + len(rest) :])
            return mask(rest)

        if mask is not None:
            request.params, request.adjustment = replace(request.params, logits_mask=of_rest), None

    patch.setattr(Adjustment, "forbidden_by", lambda self, output_ids, token: None)
    after_resuming(patch, forget)


def output_penalized_as_prompt(patch: pytest.MonkeyPatch) -> None:
    """Penalties take the given tokens for a part of the prompt."""

    class Mistaken(Adjustment):
        num_given = 0

        def _log(self, output_ids: list[int], drafts: Sequence[int]) -> int:
            return super()._log(output_ids[self.num_given :], drafts)

    def adjustment_of(request: Request, eos_ids: frozenset[int], vocab_size: int) -> Adjustment:
        if request.adjustment is None:
            given = request.output_ids[: request.num_given]
            request.adjustment = Mistaken([*request.prompt_ids, *given], request.params, eos_ids, vocab_size)
            request.adjustment.num_given = request.num_given
        return request.adjustment

    patch.setattr(answer_tokens, "_check_allowed", lambda *_: None)
    patch.setattr(sampling, "adjustment_of", adjustment_of)


def stop_string_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A stop string is not found if it begins before the seam."""

    def forget(request: Request, new_detokenizer: Any) -> None:
        if request.answer is not None and request.finish_reason is None and request.ends_as is None:
            parts = vars(request.answer)
            request.answer.text += parts["_stops"].finish()
            parts["_stops"] = StopStrings(request.params.stop, request.params.include_stop_str_in_output)

    after_resuming(patch, forget)


def min_tokens_begin_anew(patch: pytest.MonkeyPatch) -> None:
    """Stop strings are ignored for min_tokens tokens after the seam."""

    def forget(request: Request, new_detokenizer: Any) -> None:
        if request.answer is not None:
            vars(request.answer)["_num_tokens"] = 0

    after_resuming(patch, forget)


def text_begins_anew(patch: pytest.MonkeyPatch) -> None:
    """The text after the seam is read by a new detokenizer."""

    def forget(request: Request, new_detokenizer: Any) -> None:
        if request.answer is not None and request.finish_reason is None:
            old, request.answer = request.answer.text, AnswerText(new_detokenizer(request), request.params)
            request.answer.text = old

    after_resuming(patch, forget)


def noise_begins_anew(patch: pytest.MonkeyPatch) -> None:
    """The noise is that of the first tokens of an answer."""
    choices = sampling.choices

    def changed(request: Request, *rest: Any, **options: Any) -> list[dict[str, Any]]:
        rows = choices(request, *rest, **options)
        return [row | dict(position=row["position"] - request.num_given) for row in rows]

    patch.setattr(sampling, "choices", changed)


def logprobs_of_the_wrong_rows(patch: pytest.MonkeyPatch) -> None:
    """A given token's log-probability is read from the row after it."""
    given_rows = sampling.given_rows

    def changed(request: Request, start: int, end: int) -> dict[int, dict[str, Any]]:
        rows, first = given_rows(request, start, end), len(request.prompt_ids) - 1 - start
        moved = {at + 1: fields for at, fields in rows.items() if at >= first and at + 1 < end - start - 1}
        return rows | moved

    patch.setattr(sampling, "given_rows", changed)


def text_sent_again(patch: pytest.MonkeyPatch) -> None:
    """A reader gets the text that was certain before the seam once more, but for its first character."""

    def forget(request: Request, new_detokenizer: Any) -> None:
        request.num_given_characters = min(1, request.num_given_characters)

    after_resuming(patch, forget)


FAULTS = {
    each.__name__: each
    for each in (
        one_token_fewer,
        one_token_too_many,
        mask_not_replayed,
        output_penalized_as_prompt,
        noise_begins_anew,
        logprobs_of_the_wrong_rows,
    )
}
# those that a proof of text alone, without an engine, must find
TEXT_FAULTS = {
    each.__name__: each for each in (stop_string_forgotten, min_tokens_begin_anew, text_begins_anew, text_sent_again)
}
