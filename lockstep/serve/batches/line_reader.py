"""A line of a batch's input as a request: {"custom_id", "method", "url", "body"}, as OpenAI's API has it."""

import dataclasses
import hashlib
import json
from typing import Any

from lockstep.batch.lines import Line, RawLine, line_key, response_line
from lockstep.serve.answers.json_response import to_json
from lockstep.serve.errors import ApiError, bad_request, openai_shape, wrong_field
from lockstep.serve.fields.body import integral, parse, shown
from lockstep.serve.fields.sampling import RANDOM
from lockstep.serve.limits import Limits
from lockstep.serve.service import Service

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages")
VERSION = 1  # of how answers are settled: a change makes new keys
WRAPPING_BYTES = 1 << 16  # of a line besides its body
NUMBER_BYTES = 8


def identity_of(service: Service) -> bytes:
    """Stands for all that the answer to a line depends on besides the line. The model's content hash must be known."""
    assert service.fingerprint is not None, "the model's content hash is known"
    parts = [VERSION, service.fingerprint, service.model_name, service.max_context, service.limits.max_answer_values]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def most_line_bytes(limits: Limits) -> int:
    """The bytes that a line may have."""
    return limits.max_body_bytes + WRAPPING_BYTES


class LineReader:
    """Makes Lines of the lines of one input, which it sees in order. identity: see `identity_of`. endpoint: the only
    url that is allowed; None for any of ENDPOINTS."""

    def __init__(self, identity: bytes, limits: Limits, endpoint: str | None = None) -> None:
        self._identity, self._endpoints = identity, ENDPOINTS if endpoint is None else (endpoint,)
        self._max_bytes = most_line_bytes(limits)
        self._limits = dataclasses.replace(limits, max_depth=limits.max_depth + 1)
        self._seen: dict[bytes, int] = {}

    def __call__(self, raw: RawLine) -> Line:
        """The line as a request, or with the line of the output that says why it is none."""
        custom_id = None
        try:
            value = self._parsed(raw)
            custom_id = _custom_id(value)
            self._check_new(custom_id, raw.number)
            url, body = self._url(value), _body(value)
        except ApiError as error:
            return self._refused(raw, custom_id, error)
        if url != "/v1/embeddings" and needs_seed(body):
            body = body | dict(seed=seed_of(raw.digest))
        sent = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        return Line(line_key(self._identity, raw.digest), None, custom_id, url, sent)

    def _parsed(self, raw: RawLine) -> dict[str, Any]:
        if raw.is_too_long:
            raise ApiError(413, f"the line is longer than {self._max_bytes} bytes", code="line_too_long")
        try:
            return parse(raw.content, self._limits)
        except ApiError as error:
            message = error.message.replace("the body", "the line", 1)
            raise ApiError(error.status, message, error.param, error.code or "invalid_json_line") from None

    def _check_new(self, custom_id: str, number: int) -> None:
        digest = hashlib.sha256(custom_id.encode()).digest()[:16]
        first = self._seen.setdefault(digest, number)
        if first != number:
            problem = f"line {first} has {shown(custom_id)}, too: expected another one for each line"
            raise wrong_field("custom_id", problem, "duplicate_custom_id")

    def _url(self, value: dict[str, Any]) -> str:
        method, url = value.get("method"), value.get("url")
        if method != "POST":
            raise wrong_field("method", f'expected "POST", got {shown(method)}', "invalid_method")
        if not isinstance(url, str) or url not in self._endpoints:
            expected = " or ".join(self._endpoints)
            raise ApiError(404, f"url: expected {expected}, got {shown(url)}", "url", "invalid_url")
        return url

    def _refused(self, raw: RawLine, custom_id: str | None, error: ApiError) -> Line:
        key = line_key(self._identity, raw.digest, raw.number.to_bytes(NUMBER_BYTES, "little"))
        return Line(key, response_line(key, custom_id, error.status, to_json(openai_shape(error))), custom_id)


def _custom_id(value: dict[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise wrong_field("custom_id", f"expected a string that names the line, got {shown(custom_id)}")
    return custom_id


def _body(value: dict[str, Any]) -> dict[str, Any]:
    body = value.get("body")
    if not isinstance(body, dict):
        raise bad_request(f"body: expected an object, got {shown(body)}", "body", "invalid_value")
    if body.get("stream"):
        problem = f"expected false or none in a batch, got {shown(body['stream'])}"
        raise wrong_field("body.stream", problem, "unsupported")
    return body


def needs_seed(body: dict[str, Any]) -> bool:
    """Whether a server would draw a seed for a request: there is none, and no receipt's nonce to make one of."""
    receipt = body.get("receipt")
    has_nonce = isinstance(receipt, dict) and receipt.get("nonce") is not None
    return not has_nonce and (body.get("seed") is None or _is_random(body["seed"]))


def _is_random(seed: object) -> bool:
    return type(seed) in (int, float) and integral(seed) == RANDOM


def seed_of(digest: bytes) -> int:
    """The seed of a request without one. digest: the SHA-256 of its line."""
    return int.from_bytes(hashlib.sha256(b"lockstep batch seed" + digest).digest()[:8], "little") >> 1
