"""Checks of a request against its model, before it is queued."""

from collections.abc import Sequence
from typing import Any

from lockstep.engine.model import Model
from lockstep.engine.request import SamplingParams, check_params


def check(
    model: Model,
    has_tokenizer: bool,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    priority: Any,
    cache_salt: Any,
    prediction: Sequence[int],
) -> None:
    """ValueError for a request that a model cannot run; see `Engine.make` for the parameters."""
    check_params(params)
    if params.pooling is None and not model.can_generate:
        raise ValueError("this checkpoint has no lm_head: it makes embeddings, and no text")
    if not isinstance(priority, int):
        raise ValueError(f"priority: expected an integer, got {priority!r}")
    if not isinstance(cache_salt, str):
        raise ValueError(f"cache_salt: expected a string, got {cache_salt!r}")
    limit, vocab = model.max_context, model.config.vocab_size
    if not prompt_ids:
        raise ValueError("prompt: expected at least one token, got none")
    _check_ids("prompt", prompt_ids, vocab)
    params.check_vocabulary(vocab)
    if params.stop and not has_tokenizer:
        raise ValueError("stop: there is no tokenizer to read answers with; use stop_token_ids")
    if len(prompt_ids) + params.max_tokens > limit:
        raise ValueError(
            f"prompt of {len(prompt_ids)} tokens plus max_tokens {params.max_tokens} is more than the "
            f"context of {limit} tokens"
        )
    if len(prediction) > limit:
        raise ValueError(f"prediction: expected at most {limit} tokens, as many as the context, got {len(prediction)}")
    _check_ids("prediction", prediction, vocab)


def _check_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        got = f"{min(token_ids)} to {max(token_ids)}"
        raise ValueError(f"{name}: token ids must be 0 to {vocab_size - 1}, got {got}")
