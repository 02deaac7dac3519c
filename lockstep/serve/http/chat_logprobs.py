"""Log-probabilities in the shape of /v1/chat/completions: an object for each token, with its bytes."""

from typing import Any

from lockstep.engine.request import Request
from lockstep.serve.http.encode import in_parts
from lockstep.serve.http.legacy_logprobs import token_text
from lockstep.serve.tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, request: Request, start: int, end: int) -> dict[str, Any]:
    """Those of output tokens start .. end of a request."""
    tops = request.top_logprobs or [{}] * end
    each = zip(request.output_ids[start:end], request.logprobs[start:end], tops[start:end], strict=True)
    return dict(content=[one_logprob(tokenizer, *of_token) for of_token in each], refusal=None)


def whole_logprobs(tokenizer: Tokenizer, request: Request) -> dict[str, Any]:
    """Those of a finished request, in parts."""
    return dict(
        refusal=None,
        content=in_parts(
            len(request.output_ids), lambda start, end: chat_logprobs(tokenizer, request, start, end)["content"]
        ),
    )


def one_logprob(tokenizer: Tokenizer, token_id: int, logprob: float, top: dict[int, float] | None) -> dict[str, Any]:
    """That of one token. top: {id: log-probability} of the likeliest in its place, or None."""
    made = _described(tokenizer, token_id, logprob)
    return made | dict(top_logprobs=[_described(tokenizer, other, value) for other, value in (top or {}).items()])


def _described(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return dict(token=token_text(tokenizer, token_id), logprob=logprob, bytes=list(tokenizer.token_bytes(token_id)))
