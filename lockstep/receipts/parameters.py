"""The sampling parameters in a receipt.

Real numbers are written as the bits of the float32 that the kernels read, in eight hexadecimal digits; the seed, which
other readers of JSON would round, as a text of decimal digits. A parameter with its usual value is left out.
"""

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lockstep.engine.request import BOUNDS, SamplingParams
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import Fields, ids_digest, is_token, reading, shown
from lockstep.receipts.text_sizes import MAX_STOP_CHARS, MAX_STOPS, MAX_TOKEN_IDS

FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
INTEGERS = ("max_tokens", "top_k", "min_tokens", "n", "logprobs", "prompt_logprobs")
SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
ID_LISTS = ("stop_token_ids", "suppress_tokens")
ELSEWHERE = {"logits_mask": "the statement's form", "pooling": "an embedding has no receipt"}
LOWEST = {name: low for name, _, low, _ in BOUNDS}
MAX_INT32 = (1 << 31) - 1


def float_bits(value: float) -> str:
    """The bits of a number as a float32: eight hexadecimal digits, the most significant first."""
    return struct.pack(">f", value).hex()


def to_json(params: SamplingParams) -> dict[str, Any]:
    """The parameters of a request as an object of JSON. ReceiptError for those of an embedding."""
    if params.pooling is not None:
        raise ReceiptError("receipt: expected a request for an answer, got one for an embedding")
    usual, made = SamplingParams(), {}
    for field in dataclasses.fields(SamplingParams):
        name, value = field.name, getattr(params, field.name)
        if name not in ELSEWHERE and _written(name, value) != _written(name, getattr(usual, name)):
            made[name] = _written(name, value)
    return made


def _written(name: str, value: Any) -> Any:
    if name in FLOATS:
        return float_bits(value)
    if name == "seed":
        return str(value)
    if name == "logit_bias":
        return {str(token): float_bits(bias) for token, bias in sorted(value.items())}
    return list(value) if isinstance(value, tuple) else value


def from_json(value: Any, logits_mask: Callable[[list[int]], Any] | None = None) -> SamplingParams:
    """The SamplingParams of an object of JSON. ReceiptError for anything else, and for values that are not allowed."""
    found: dict[str, Any] = {}
    with reading(value, "sampling.") as fields:
        for name in FLOATS:
            if name in fields:
                found[name] = _float(fields, name)
        for name in INTEGERS:
            if name in fields:
                found[name] = fields.integer(name, 0, MAX_INT32)
        for name in SWITCHES:
            if name in fields:
                found[name] = fields.boolean(name)
        for name in ID_LISTS:
            if name in fields:
                found[name] = tuple(fields.items(name, MAX_TOKEN_IDS, is_token, "token ids"))
        if "stop" in fields:
            found["stop"] = tuple(fields.items("stop", MAX_STOPS, _is_stop, "texts"))
        if "seed" in fields:
            found["seed"] = _seed(fields)
        if "logit_bias" in fields:
            found["logit_bias"] = _biases(fields.take("logit_bias"))
    try:
        return SamplingParams(**found, logits_mask=logits_mask)
    except ValueError as error:
        raise ReceiptError(f"sampling.{error}") from None


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_STOP_CHARS


def seed_of(nonce: str, prompt_ids: Sequence[int]) -> int:
    """The seed of a request that sends a nonce and no seed, so that nobody can choose it to get an answer of their
    liking: the first 8 bytes, as a little-endian integer without its highest bit, of SHA-256("lockstep seed", SHA-256
    of the prompt's ids as little-endian uint32, nonce)."""
    digest = hashlib.sha256(b"lockstep seed" + ids_digest(prompt_ids) + nonce.encode()).digest()
    return int.from_bytes(digest[:8], "little") & ((1 << 63) - 1)


def _float(fields: Fields, name: str) -> float:
    """A number of which the kernels read these bits. The lowest number that a parameter may have is no float32: the
    float32 beside it stands for it."""
    bits = fields.hex(name, 4)
    lowest = LOWEST.get(name)
    if lowest is not None and bits.hex() == float_bits(lowest):
        return float(lowest)
    return struct.unpack(">f", bits)[0]


def _seed(fields: Fields) -> int:
    text = fields.text("seed", 20)
    if not (text.removeprefix("-").isdecimal() and text.isascii() and str(int(text)) == text):
        fields.refuse("seed", f"expected decimal digits, got {shown(text)}")
    return int(text)


def _biases(value: Any) -> Mapping[int, float]:
    biases = Fields(value, "sampling.logit_bias.")
    if len(value) > MAX_TOKEN_IDS:
        raise ReceiptError(f"sampling.logit_bias: expected at most {MAX_TOKEN_IDS} tokens, got {len(value)}")
    found = {}
    for token in value:
        is_number = token.isascii() and token.isdecimal() and len(token) < 11 and str(int(token)) == token
        if not (is_number and is_token(int(token))):
            biases.refuse(token[:40], "expected a token id as the key")
        found[int(token)] = _float(biases, token)
    return found
