"""What a receipt says: which model answered which prompt, by which parameters, with which tokens.

It has no time, no id and nothing about the machine: the same request has the same statement, byte for byte. Its JSON is
described field by field in docs/receipts.md.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lockstep.engine.request import SamplingParams
from lockstep.receipts import parameters, strict_json
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import Fields, ids_bytes, ids_digest, is_token, reading, shown, to_base64, without_none
from lockstep.receipts.form import Form, check_form, without_texts
from lockstep.receipts.identity import ModelPart, read_model
from lockstep.receipts.text_sizes import MAX_NONCE_CHARS, MAX_STOP_CHARS, MAX_TOKENS

VERSION = 1
TAG_BYTES = 2
ID_BYTES = 3  # no vocabulary has 2**24 tokens
SALT_BYTES = 32
REASONS = ("stop", "length", "cancelled")
PRINTABLE = re.compile(r"[ -~]*")


def packed(token_ids: Sequence[int]) -> str:
    """Token ids as a statement has them: base64 of three bytes each, the lowest first."""
    bytes_T4 = np.array(token_ids, "<u4").view(np.uint8).reshape(-1, 4)
    return to_base64(bytes_T4[:, :ID_BYTES].tobytes())


def unpacked(data: bytes) -> tuple[int, ...]:
    """The token ids of such bytes."""
    bytes_T4 = np.zeros((len(data) // ID_BYTES, 4), np.uint8)
    bytes_T4[:, :ID_BYTES] = np.frombuffer(data, np.uint8).reshape(-1, ID_BYTES)
    return tuple(bytes_T4.view("<u4")[:, 0].tolist())


def commitment(salt: bytes, token_ids: Sequence[int]) -> bytes:
    """What binds a prompt without telling it, even where it could be guessed. salt: SALT_BYTES random bytes, which only
    those get who may verify."""
    return hashlib.sha256(b"lockstep prompt" + salt + ids_bytes(token_ids)).digest()


def salt_of(text: str) -> bytes:
    """The salt of a commitment, written as hexadecimal digits. ReceiptError for anything else."""
    try:
        salt = bytes.fromhex(text)
    except (ValueError, TypeError):
        salt = b""
    if len(salt) != SALT_BYTES:
        raise ReceiptError(f"salt: expected {2 * SALT_BYTES} hexadecimal digits, got {shown(text)}")
    return salt


@dataclass(frozen=True)
class PromptPart:
    """The prompt of a statement. tokens: how many. digest: of its ids, or their `commitment` where is_hidden. ids: None
    where they are left out. root: of the tree over the rows that reported its tokens, if they were asked for."""

    tokens: int
    digest: bytes
    is_hidden: bool = False
    ids: tuple[int, ...] | None = None
    root: bytes | None = None

    def to_object(self) -> dict[str, Any]:
        """The part as an object of JSON."""
        return without_none(
            {
                "tokens": self.tokens,
                "commitment" if self.is_hidden else "sha256": self.digest.hex(),
                "ids": None if self.ids is None else packed(self.ids),
                "root": self.root and self.root.hex(),
            }
        )

    def is_of(self, token_ids: Sequence[int], salt: bytes | None = None) -> bool:
        """Whether these are its token ids. salt: of the commitment."""
        if len(token_ids) != self.tokens or not all(map(is_token, token_ids)):
            return False
        return self.digest == (commitment(salt or b"", token_ids) if self.is_hidden else ids_digest(token_ids))


@dataclass(frozen=True)
class AnswerPart:
    """The answer of a statement. root: of the tree over its leaves. finish_reason: one of REASONS. tags: TAG_BYTES of
    the hash of each leaf, or None. ids: None where they are left out."""

    tokens: int
    root: bytes
    finish_reason: str
    stop_reason: int | str | None = None
    ids: tuple[int, ...] | None = None
    tags: bytes | None = None

    def to_object(self) -> dict[str, Any]:
        """The part as an object of JSON."""
        return without_none(
            dict(
                tokens=self.tokens,
                root=self.root.hex(),
                finish_reason=self.finish_reason,
                stop_reason=self.stop_reason,
                ids=None if self.ids is None else packed(self.ids),
                tags=None if self.tags is None else to_base64(self.tags),
            )
        )


@dataclass(frozen=True)
class Statement:
    """The payload of a receipt. params: of the request, without a mask; sample: the number of the answer among its n.
    form: what held the answer to a form, see `form`. endpoint: of the API where it was made. nonce: the client's."""

    numerics: int
    model: ModelPart
    prompt: PromptPart
    params: SamplingParams
    answer: AnswerPart
    sample: int = 0
    form: Form | None = None
    endpoint: str | None = None
    nonce: str | None = None

    def to_bytes(self) -> bytes:
        """The JSON text."""
        known = dict(
            version=VERSION,
            numerics=self.numerics,
            model=self.model.to_object(),
            endpoint=self.endpoint,
            nonce=self.nonce,
            prompt=self.prompt.to_object(),
            sampling=parameters.to_json(self.params),
            sample=self.sample or None,
            form=self.form,
            answer=self.answer.to_object(),
        )
        return strict_json.dumps(without_none(known))

    def detached(self) -> "Statement":
        """The statement without the tokens and the texts of grammars, which whoever verifies it must have."""
        prompt, answer = replace(self.prompt, ids=None), replace(self.answer, ids=None)
        return replace(self, prompt=prompt, answer=answer, form=without_texts(self.form))


def from_bytes(payload: bytes) -> Statement:
    """The Statement of a JSON text. ReceiptError for a text that is none, or of another version, or breaks a bound."""
    with reading(strict_json.of_payload(payload)) as fields:
        version = fields.take("version")
        if version != VERSION or type(version) is not int:
            fields.refuse("version", f"expected {VERSION}, got {shown(version)}")
        params = parameters.from_json(fields.take("sampling"))
        made = Statement(
            numerics=fields.integer("numerics", 1, 1 << 31),
            model=read_model(fields.take("model")),
            prompt=_prompt(fields.take("prompt"), params),
            params=params,
            answer=_answer(fields.take("answer"), params),
            sample=fields.integer("sample", 0, params.n - 1) if "sample" in fields else 0,
            form=check_form(fields.take("form")) if "form" in fields else None,
            endpoint=fields.text("endpoint", 64) if "endpoint" in fields else None,
            nonce=check_nonce(fields.take("nonce")) if "nonce" in fields else None,
        )
    if made.prompt.tokens + params.max_tokens > made.model.context:
        got = f"{made.prompt.tokens} + {params.max_tokens} in {made.model.context}"
        raise ReceiptError(f"model.context: expected room for the prompt and sampling.max_tokens, got {got}")
    return made


def check_nonce(value: Any) -> str:
    """A nonce, if it is one. ReceiptError for anything else."""
    if not isinstance(value, str) or len(value) > MAX_NONCE_CHARS or not PRINTABLE.fullmatch(value):
        raise ReceiptError(f"nonce: expected up to {MAX_NONCE_CHARS} printable ASCII characters, got {shown(value)}")
    return value


def _prompt(value: Any, params: SamplingParams) -> PromptPart:
    fields = Fields(value, "prompt.")
    tokens, is_hidden = fields.integer("tokens", 1, MAX_TOKENS), "commitment" in fields
    digest = fields.hex("commitment" if is_hidden else "sha256", 32)
    made = PromptPart(
        tokens, digest, is_hidden, _ids(fields, tokens), fields.hex("root", 32) if "root" in fields else None
    )
    fields.finish()
    if made.ids is not None and (is_hidden or not made.is_of(made.ids)):
        fields.refuse("ids", "expected none with a commitment" if is_hidden else "their SHA-256 is another")
    if (made.root is None) != (params.prompt_logprobs is None):
        fields.refuse("root", "expected exactly where sampling.prompt_logprobs asks for the prompt's log-probabilities")
    return made


def _answer(value: Any, params: SamplingParams) -> AnswerPart:
    fields = Fields(value, "answer.")
    tokens = fields.integer("tokens", 0, min(MAX_TOKENS, params.max_tokens))
    reason = fields.text("finish_reason", 16)
    if reason not in REASONS:
        fields.refuse("finish_reason", f"expected one of {', '.join(REASONS)}, got {shown(reason)}")
    stop_reason = fields.take("stop_reason") if "stop_reason" in fields else None
    if not (stop_reason is None or is_token(stop_reason) or _is_stop(stop_reason)):
        fields.refuse("stop_reason", f"expected a token id or a text, got {shown(stop_reason)}")
    tags = fields.base64("tags", TAG_BYTES * tokens) if "tags" in fields else None
    made = AnswerPart(tokens, fields.hex("root", 32), reason, stop_reason, _ids(fields, tokens), tags)
    fields.finish()
    return made


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_STOP_CHARS


def _ids(fields: Fields, tokens: int) -> tuple[int, ...] | None:
    """The token ids of a part that has `tokens` of them; None where they are left out."""
    if "ids" not in fields:
        return None
    return unpacked(fields.base64("ids", ID_BYTES * tokens))
