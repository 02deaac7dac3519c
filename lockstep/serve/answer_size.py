"""How many values an answer may have. A value is a token or a log-probability: both take about the same memory."""

from collections.abc import Sequence
from dataclasses import replace

from lockstep.engine.request import Request, SamplingParams
from lockstep.serve.errors import wrong_field

Prompts = Sequence[tuple[list[int], SamplingParams]]


def num_values(prompts: Prompts) -> int:
    """The most values that the answers to the prompts, [(token ids, SamplingParams), ...], can have."""
    return sum(params.n * params.max_tokens for _, params in prompts) + num_logprobs(prompts)


def num_logprobs(prompts: Prompts) -> int:
    """The most log-probabilities (of alternatives and of prompts) that the answers to the prompts can have."""
    return sum(
        params.n * (params.max_tokens * (params.logprobs or 0) + _of_prompt(ids, params)) for ids, params in prompts
    )


def _of_prompt(ids: list[int], params: SamplingParams) -> int:
    return 0 if params.prompt_logprobs is None else len(ids) * (1 + params.prompt_logprobs)


def num_values_held(requests: Sequence[Request]) -> int:
    """The number of values that finished requests have."""
    return sum(
        len(request.output_ids) * (1 + (request.params.logprobs or 0))
        + len(request.prompt_logprobs) * (1 + (request.params.prompt_logprobs or 0))
        for request in requests
    )


def fit_answers(prompts: Prompts, max_values: int, max_context: int) -> Prompts:
    """The prompts, if their answers can have at most `max_values` values; else ApiError 400.

    Where all answers may fill the context, so that the client set no length, they are made shorter instead.
    """
    found = num_values(prompts)
    if found <= max_values:
        return prompts
    share = max_values // len(prompts)
    shorter = [prompt for ids, params in prompts if (prompt := _shorter(ids, params, share)) is not None]
    if all(len(ids) + params.max_tokens == max_context for ids, params in prompts) and len(shorter) == len(prompts):
        return shorter
    raise wrong_field(
        "max_tokens",
        f"all samples of all prompts together may have {found} tokens and log-probabilities "
        f"(samples x max_tokens x (1 + logprobs), and those of prompts), expected at most {max_values}",
        "answer_too_large",
    )


def _shorter(ids: list[int], params: SamplingParams, max_values: int) -> tuple[list[int], SamplingParams] | None:
    """A prompt with max_tokens lowered so that its answers have at most `max_values` values; None if no token is
    left."""
    max_tokens = (max_values // params.n - _of_prompt(ids, params)) // (1 + (params.logprobs or 0))
    if max_tokens < max(1, params.min_tokens):
        return None
    return ids, replace(params, max_tokens=min(params.max_tokens, max_tokens))
