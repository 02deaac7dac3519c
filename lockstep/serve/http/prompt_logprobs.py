"""Log-probabilities of a prompt in vLLM's shape: an object for each token, from token ids to what is known of them."""

from lockstep.serve.http.encode import Parts, in_parts
from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.legacy_logprobs import token_text
from lockstep.serve.tokenizer import Tokenizer


def check_prompt_logprobs(fields) -> None:
    """ApiError 400 where the prompt_logprobs of a completion or chat have no place in the answer."""
    if fields.prompt_logprobs is None:
        return
    if fields.stream:
        raise bad_request(
            "prompt_logprobs: not in a stream, expected none or stream to be false", "prompt_logprobs", "unsupported"
        )
    if getattr(fields, "echo", None) and fields.logprobs is not None:
        raise bad_request(
            "prompt_logprobs: expected none beside echo with logprobs, which reports the same",
            "prompt_logprobs",
            "unsupported",
        )


def prompt_logprobs(tokenizer: Tokenizer | None, request) -> Parts:
    """Those of a finished request, an array: None for the first token, then {id: {"logprob", "rank", "decoded_token"}}
    of the likeliest tokens and of the prompt's own, whose rank is None where it is not among them."""
    tops = request.prompt_top_logprobs or [{}] * len(request.prompt_logprobs)
    known = list(zip(request.prompt_ids[1:], request.prompt_logprobs, tops, strict=True))

    def of_tokens(start: int, end: int) -> list[dict | None]:
        made: list[dict | None] = [_of_token(tokenizer, *each) for each in known[max(0, start - 1) : end - 1]]
        return made if start else [None, *made]

    return in_parts(1 + len(known), of_tokens)


def _of_token(tokenizer: Tokenizer | None, token_id: int, logprob: float, top: dict[int, float]) -> dict:
    ranked: dict[int, tuple[float, int | None]] = {}
    for rank, (other, value) in enumerate(top.items(), 1):
        ranked[other] = value, rank
    ranked.setdefault(token_id, (logprob, None))
    return {
        str(other): dict(logprob=value, rank=rank, decoded_token=token_text(tokenizer, other))
        for other, (value, rank) in ranked.items()
    }
