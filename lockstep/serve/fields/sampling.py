"""The fields that set how tokens are sampled, the same on every route that generates."""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from lockstep.engine.request import MIN_TEMPERATURE, SamplingParams
from lockstep.serve.errors import check_most, not_allowed, wrong_field
from lockstep.serve.fields.body import Items, Whole, integral, shown
from lockstep.serve.fields.known import GENERATION, KnownFields
from lockstep.serve.fields.prediction import PredictionFields
from lockstep.serve.fields.receipt import Receipt
from lockstep.serve.limits import Limits

INT64: dict[str, Any] = dict(ge=-(1 << 63), le=(1 << 63) - 1)
TokenId = Annotated[Whole, Field(ge=0, lt=1 << 31)]
Count = Annotated[Whole, Field(ge=0, le=1 << 30)]
UNTIL_FULL = RANDOM = -1  # UNTIL_FULL: a value of max_tokens; RANDOM: a value of seed
SEED_BITS = 53  # of drawn seeds: programs whose numbers are all float64 can send them again
MOST_TOKENS = ("n_predict", "max_completion_tokens", "max_tokens", "max_output_tokens")  # this field's names on routes


def _check_most(value: int) -> int:
    if value < 1 and value != UNTIL_FULL:
        raise ValueError("expected at least 1, or -1 for as many as the context has room for")
    return value


# the most tokens of an answer; a number above the context's room, and UNTIL_FULL, mean all of the room
MostTokens = Annotated[Whole, AfterValidator(_check_most)]
CacheSalt = Annotated[str, Field(max_length=256)]
Penalty = Annotated[float, Field(ge=0.01, le=100)]


def _as_object(biases: object) -> object:
    """llama.cpp's logit_bias, an array of [token id, bias], as OpenAI's object; any other value unchanged."""
    if not isinstance(biases, list):
        return biases
    for each in biases:
        if not (isinstance(each, list) and len(each) == 2 and type(integral(each[0])) is int):
            raise ValueError("expected an object from token ids to numbers, or an array of [token id, number]")
    return {str(integral(token)): bias for token, bias in biases}


Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_as_object)]


class SamplingFields(KnownFields):
    """OpenAI's sampling fields and the usual extensions. null means the default."""

    refused: ClassVar = GENERATION

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=(1 << 31) - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(**INT64)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None  # at most Limits.max_samples
    n_cmpl: Annotated[Whole, Field(ge=1)] | None = None  # llama.cpp's name for n; used where both are given
    best_of: Whole | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Items[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    repetition_penalty: Penalty | None = None
    repeat_penalty: Penalty | None = None  # llama.cpp's name
    repeat_last_n: Whole | None = None
    penalize_nl: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    suppress_tokens: Items[TokenId] | None = None
    allowed_token_ids: Items[Whole] | None = None
    bad_words: Items[str] | None = None
    cache_salt: CacheSalt | None = None
    prediction: PredictionFields | None = None
    receipt: Receipt | None = None

    @property
    def num_samples(self) -> int:
        """The number of samples of each prompt."""
        return self.n_cmpl or self.n or 1


# defaults of the fields that SamplingParams takes unchanged; for OpenAI the temperature's is 1
DEFAULTS = {
    each.name: each.default
    for each in dataclasses.fields(SamplingParams)
    if each.name in SamplingFields.model_fields and each.name not in ("seed", "stop", "stop_token_ids", "logit_bias")
} | {"temperature": 1.0}
LEAST_TOP_P = 1e-9


def sampling_params(
    fields: SamplingFields, limits: Limits, max_tokens: int, defaults: Mapping, **other_params
) -> SamplingParams:
    """SamplingParams of a request's SamplingFields. ApiError 400 for a value that is not allowed.

    defaults: the model's, for fields that the request leaves out; they override the API's DEFAULTS. other_params: other
    arguments of SamplingParams, such as logprobs. Without a seed, or with RANDOM, a request gets a random seed, or 0
    where nothing is drawn.
    """
    chosen = {
        name: default if getattr(fields, name) is None else getattr(fields, name)
        for name, default in {**DEFAULTS, **defaults}.items()
    }
    chosen["top_p"] = max(chosen["top_p"], LEAST_TOP_P)  # 0 means the most probable token, for OpenAI
    chosen["top_k"] = max(chosen["top_k"], 0)  # -1 means all, for vLLM
    chosen["temperature"] = chosen["temperature"] and max(chosen["temperature"], MIN_TEMPERATURE)
    chosen["repetition_penalty"] = _repetition_penalty(fields, chosen["repetition_penalty"])
    seed = fields.seed
    if seed in (None, RANDOM):
        seed = secrets.randbits(SEED_BITS) if chosen["temperature"] else 0
    chosen["n"] = fields.num_samples
    _check_samples(fields, limits)
    _check_window(fields, chosen)
    check_most("suppress_tokens", len(fields.suppress_tokens or ()), limits.max_logit_bias)
    check_most("stop_token_ids", len(fields.stop_token_ids or ()), limits.max_stop)
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            stop=_stop_strings(fields.stop, limits),
            stop_token_ids=tuple(fields.stop_token_ids or ()),
            logit_bias=_logit_bias(fields.logit_bias or {}, limits),
            **chosen,
            **other_params,
        )
    except ValueError as error:
        raise not_allowed(error) from None


def most_tokens(fields: SamplingFields, room: int, default: int | None = None) -> int:
    """The most tokens of an answer: the first field of MOST_TOKENS that is not null, and at most `room`.

    default: for a body without any of these fields; None for all of the room.
    """
    given = next((value for name in MOST_TOKENS if (value := getattr(fields, name, None)) is not None), None)
    if given is None and fields.model_fields_set.isdisjoint(MOST_TOKENS):
        given = default
    return room if given in (None, UNTIL_FULL) else min(given, room)


def _repetition_penalty(fields: SamplingFields, chosen: float) -> float:
    first, second = fields.repetition_penalty, fields.repeat_penalty
    if None not in (first, second) and first != second:
        raise wrong_field(
            "repeat_penalty", f"expected the value of repetition_penalty, {shown(first)}, or none, got {shown(second)}"
        )
    return chosen if second is None else second


def _check_window(fields: SamplingFields, chosen: dict) -> None:
    """ApiError 400 for penalties that llama.cpp's fields restrict to a part of the tokens."""
    if chosen["repetition_penalty"] == 1 and not chosen["presence_penalty"] and not chosen["frequency_penalty"]:
        return
    if fields.repeat_last_n not in (None, -1):
        raise wrong_field(
            "repeat_last_n",
            f"penalties look at all tokens, expected -1 or none, got {fields.repeat_last_n}",
            "unsupported",
        )
    if fields.penalize_nl is False:
        raise wrong_field(
            "penalize_nl", "penalties look at all tokens, expected true or none, got false", "unsupported"
        )


def check_single(fields: SamplingFields) -> None:
    """ApiError 400 for several samples, on routes whose answers have one."""
    if fields.num_samples != 1:
        name = _name_of_n(fields)
        raise wrong_field(name, f"expected 1, got {fields.num_samples}")


def _name_of_n(fields: SamplingFields) -> str:
    return "n" if fields.n_cmpl is None else "n_cmpl"


def _check_samples(fields: SamplingFields, limits: Limits) -> None:
    n, name = fields.num_samples, _name_of_n(fields)
    check_most(name, n, limits.max_samples)
    if fields.best_of not in (None, n):
        raise wrong_field("best_of", f"expected none or the value of {name}, {n}, got {fields.best_of}", "unsupported")


def _stop_strings(stop, limits):
    strings = [each for each in ([stop] if isinstance(stop, str) else stop or []) if each]
    check_most("stop", len(strings), limits.max_stop, "strings")
    check_most("stop", max(map(len, strings), default=0), limits.max_stop_chars, "characters")
    return tuple(strings)


def _logit_bias(biases, limits):
    check_most("logit_bias", len(biases), limits.max_logit_bias, "tokens")
    for token in biases:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise wrong_field("logit_bias", f"expected token ids as keys, got {token[:20]!r}")
    return {int(token): bias for token, bias in biases.items()}
