"""The fields that say how tokens are chosen, the same on every route that generates."""
import secrets
from typing import Annotated

from pydantic import Field

from lockstep.engine.request import SamplingParams
from lockstep.serve.http.body import Fields
from lockstep.serve.http.errors import bad_request, not_allowed

INT64 = dict(ge=-(1 << 63), le=(1 << 63) - 1)
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=0, le=1 << 30)]


class SamplingFields(Fields):
    """OpenAI's sampling fields and the usual extensions. null stands for the default."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(**INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    suppress_tokens: list[TokenId] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


# API field -> default; those of SamplingParams have the same names
DEFAULTS = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, n=1, ignore_eos=False, min_tokens=0,
                include_stop_str_in_output=False, skip_special_tokens=True, repetition_penalty=1.0,
                presence_penalty=0.0, frequency_penalty=0.0, suppress_tokens=())
LEAST_TOP_P = 1e-9


def sampling_params(fields, limits, max_tokens, defaults, **more):
    """SamplingParams of a request's SamplingFields. ApiError 400 for a value that is not allowed.

    defaults: the model's, for fields that the request does not have; those of the API come after them. more: other
    arguments of SamplingParams, such as logprobs. Without a seed each request draws with one of its own.
    """
    chosen = {name: default if getattr(fields, name) is None else getattr(fields, name)
              for name, default in {**DEFAULTS, **defaults}.items()}
    chosen["top_p"] = max(chosen["top_p"], LEAST_TOP_P)  # 0 means the most probable token, for OpenAI
    chosen["top_k"] = max(chosen["top_k"], 0)  # -1 means all, for vLLM
    seed = secrets.randbits(63) if fields.seed is None else fields.seed
    _check_n(chosen["n"], limits)
    _check_suppressed(fields.suppress_tokens or (), limits)
    try:
        return SamplingParams(max_tokens=max_tokens, seed=seed, stop=_stop(fields.stop, limits),
                              stop_token_ids=_stop_ids(fields.stop_token_ids or [], limits),
                              logit_bias=_bias(fields.logit_bias or {}, limits), **chosen, **more)
    except ValueError as error:
        raise not_allowed(error) from None


def _check_n(n, limits):
    if n > limits.max_samples:
        raise bad_request(f"n: expected at most {limits.max_samples}, got {n}", "n", "invalid_value")


def _check_suppressed(ids, limits):
    if len(ids) > limits.max_logit_bias:
        raise bad_request(f"suppress_tokens: expected at most {limits.max_logit_bias}, got {len(ids)}",
                          "suppress_tokens")


def _stop(stop, limits):
    strings = [stop] if isinstance(stop, str) else stop or []
    if len(strings) > limits.max_stop:
        raise bad_request(f"stop: expected at most {limits.max_stop} strings, got {len(strings)}", "stop")
    longest = max(map(len, strings), default=0)
    if longest > limits.max_stop_chars:
        raise bad_request(f"stop: expected at most {limits.max_stop_chars} characters, got {longest}", "stop")
    return tuple(strings)


def _stop_ids(ids, limits):
    if len(ids) > limits.max_stop:
        raise bad_request(f"stop_token_ids: expected at most {limits.max_stop}, got {len(ids)}", "stop_token_ids")
    return tuple(ids)


def _bias(biases, limits):
    if len(biases) > limits.max_logit_bias:
        raise bad_request(f"logit_bias: expected at most {limits.max_logit_bias} tokens, got {len(biases)}",
                          "logit_bias")
    for token in biases:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise bad_request(f"logit_bias: expected token ids as keys, got {token[:20]!r}", "logit_bias")
    return {int(token): bias for token, bias in biases.items()}
