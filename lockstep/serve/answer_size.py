"""How much an answer may hold. A value is a token or a log-probability: each takes about as much memory as another."""

from collections.abc import Sequence
from dataclasses import replace

from lockstep.engine.request import Request, SamplingParams
from lockstep.serve.errors import wrong_field

Prompts = Sequence[tuple[list[int], SamplingParams]]


def num_values(prompts: Prompts) -> int:
    """The most values that the answers to [(token ids, SamplingParams), ...] can have."""
    return sum(params.n * params.max_tokens for _, params in prompts) + num_logprobs(prompts)


def num_logprobs(prompts: Prompts) -> int:
    """How many of them are log-probabilities that were asked for."""
    return sum(
        params.n * (params.max_tokens * (params.logprobs or 0) + _of_prompt(ids, params)) for ids, params in prompts
    )


def _of_prompt(ids: list[int], params: SamplingParams) -> int:
    return 0 if params.prompt_logprobs is None else len(ids) * (1 + params.prompt_logprobs)


def num_held(requests: Sequence[Request]) -> int:
    """Values of finished requests."""
    return sum(
        len(r.output_ids) * (1 + (r.params.logprobs or 0))
        + len(r.prompt_logprobs) * (1 + (r.params.prompt_logprobs or 0))
        for r in requests
    )


def within(prompts: Prompts, most: int, max_context: int) -> Prompts:
    """The prompts, if their answers have at most so many values; ApiError 400 if they have more.

    Answers that may fill the context are made shorter instead: nobody said how long they are to be.
    """
    found = num_values(prompts)
    if found <= most:
        return prompts
    shorter = [made for ids, params in prompts if (made := _shorter(ids, params, most // len(prompts))) is not None]
    if all(len(ids) + params.max_tokens == max_context for ids, params in prompts) and len(shorter) == len(prompts):
        return shorter
    raise wrong_field(
        "max_tokens",
        f"all samples of all prompts together may have {found} tokens and log-probabilities "
        f"(samples x max_tokens x (1 + logprobs), and those of prompts), expected at most {most}",
        "answer_too_large",
    )


def _shorter(ids: list[int], params: SamplingParams, most: int) -> tuple[list[int], SamplingParams] | None:
    """The same with at most so many values; None if that leaves no token."""
    max_tokens = (most // params.n - _of_prompt(ids, params)) // (1 + (params.logprobs or 0))
    if max_tokens < max(1, params.min_tokens):
        return None
    return ids, replace(params, max_tokens=min(params.max_tokens, max_tokens))
