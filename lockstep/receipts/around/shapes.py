"""The answers of the API, each in the shape of its route, and that of `lockstep generate --json`: what they show."""

from typing import Any

from lockstep.receipts.around.shown import Shown
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import is_token

# the API's words for the end of an answer, in a receipt's
ENDINGS = dict(
    tool_calls="stop", end_turn="stop", stop_sequence="stop", tool_use="stop", completed="stop",
    max_tokens="length", incomplete="length",
)  # fmt: skip


def choices_of(answer: dict[str, Any]) -> list[Any]:
    """The choices of an answer; itself where it is its only one."""
    return answer["choices"] if isinstance(answer.get("choices"), list) else [answer]


def shown_in(choice: dict[str, Any], answer: dict[str, Any], is_stream: bool) -> Shown:
    """What a choice of an answer shows. is_stream: whether it was put together of the chunks of a stream."""
    is_end = is_stream or is_chunk(answer)
    if isinstance(answer.get("output"), list):
        return _of_responses(answer, is_end)
    if answer.get("type") in ("message", "message_delta"):
        return _of_messages(answer, is_end)
    logprobs = choice.get("logprobs")
    message = _dict(choice.get("message", choice.get("delta")))
    is_plain = not any(message.get(name) for name in ("reasoning_content", "tool_calls"))
    return Shown(
        index=_index(choice.get("index")),
        text=_text(choice.get("text")),
        message=_text(message.get("content")) if is_plain else None,
        prompt_ids=_ids(choice.get("prompt_token_ids", answer.get("prompt_token_ids")), "prompt_token_ids"),
        token_ids=_ids(choice.get("token_ids"), "token_ids"),
        finish_reason=_ending(choice.get("finish_reason")),
        logprobs=_logprobs(logprobs),
        prompt_logprobs=_list(choice.get("prompt_logprobs", answer.get("prompt_logprobs"))),
        has_more_logprobs=_has_more(logprobs) or bool(choice.get("top_logprobs")),
        is_end=is_end,
    )


def is_chunk(answer: dict[str, Any]) -> bool:
    """Whether an answer is only a chunk of a stream. Of /v1/completions a chunk has the name of a whole answer, but not
    all of its usage."""
    kind, usage = answer.get("object"), _dict(answer.get("usage"))
    if kind == "text_completion":
        return "prompt_tokens_details" not in usage
    return kind == "chat.completion.chunk" or answer.get("type") == "message_delta"


def _of_messages(answer: dict[str, Any], is_end: bool) -> Shown:
    blocks, end = _list(answer.get("content")) or [], _dict(answer.get("delta", answer))
    is_plain = bool(blocks) and all(_dict(block).get("type") == "text" for block in blocks)
    return Shown(
        message="".join(_text(block.get("text")) or "" for block in blocks) if is_plain else None,
        finish_reason=_ending(end.get("stop_reason")),
        stop_text=_text(end.get("stop_sequence")),
        is_end=is_end,
    )


def _of_responses(answer: dict[str, Any], is_end: bool) -> Shown:
    items = [_dict(item) for item in answer["output"]]
    parts = [
        _dict(part) for item in items if item.get("type") == "message" for part in _list(item.get("content")) or []
    ]
    logprobs = [_dict(each) for part in parts for each in _list(part.get("logprobs")) or []]
    is_plain = all(item.get("type") == "message" for item in items)
    return Shown(
        message="".join(_text(part.get("text")) or "" for part in parts) if is_plain else None,
        finish_reason=_ending(answer.get("status")),
        some_logprobs=[each.get("logprob") for each in logprobs],
        has_more_logprobs=any(each.get("top_logprobs") for each in logprobs),
        is_end=is_end,
    )


def _logprobs(value: Any) -> list[Any] | None:
    """Log-probabilities of tokens, in the shape of either route of OpenAI's, or as a list."""
    if isinstance(value, list):
        return value
    known = _dict(value)
    content = _list(known.get("content"))
    return _list(known.get("token_logprobs")) if content is None else [_dict(each).get("logprob") for each in content]


def _has_more(value: Any) -> bool:
    known = _dict(value)
    content = [_dict(each).get("top_logprobs") for each in _list(known.get("content")) or []]
    return any(content) or any(_list(known.get("top_logprobs")) or [])


def _ending(value: Any) -> str | None:
    return ENDINGS.get(value, value) if isinstance(value, str) else None


def _index(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any] | None:
    return value if isinstance(value, list) else None


def _text(value: Any, name: str = "text") -> str | None:
    """A text, or None. ReceiptError for anything else, which could not be compared."""
    if value is not None and not isinstance(value, str):
        raise ReceiptError(f"{name}: expected a text, got {value!r:.80}")
    return value


def _ids(value: Any, name: str) -> list[int] | None:
    """Token ids, or None. ReceiptError for anything else."""
    if value is not None and not (isinstance(value, list) and all(map(is_token, value))):
        raise ReceiptError(f"{name}: expected token ids, got {value!r:.80}")
    return value
