"""A saved stream of the API, of any route: its events are put together to the answer that they are pieces of."""

import json
from typing import Any

from lockstep.receipts import strict_json
from lockstep.receipts.errors import ReceiptError

MARKS = ("data:", "event:", "id:", "retry:", ":")  # with which lines of server-sent events begin
DONE = "[DONE]"


def is_stream(text: str) -> bool:
    """Whether a text, without space before it, is one of server-sent events."""
    return text.startswith(MARKS)


def joined(text: str) -> dict[str, Any]:
    """The answer of which the events of a stream are pieces. ReceiptError for other events, and for those of a stream
    that ended with an error."""
    events = [_event(line[5:].strip()) for line in text.split("\n") if line.startswith("data:")]
    events = [event for event in events if event is not None]
    for event in events:
        if event.get("type") in ("error", "response.failed") or isinstance(event.get("error"), dict):
            raise ReceiptError(f"the stream ended with an error: {json.dumps(event)[:200]}")
    try:
        return _put_together(events)
    except (AttributeError, TypeError):  # values of other types than the API's
        raise ReceiptError("expected the events of a stream of the API") from None


def _put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    if any("choices" in event for event in events):
        return _of_choices(events)
    kinds = {str(event.get("type")) for event in events}
    if any(kind.startswith("response.") for kind in kinds):
        return _of_responses(events)
    if "message_delta" in kinds:
        return _of_messages(events)
    raise ReceiptError("expected the events of an answer with a receipt, which is in the last of them")


def _event(data: str) -> dict[str, Any] | None:
    if data == DONE:
        return None
    value = strict_json.loads(data, has_reals=True)
    if not isinstance(value, dict):
        raise ReceiptError(f"expected events that are objects, got {data!r:.80}")
    return value


def added(old: Any, new: Any) -> Any:
    """Two pieces of a value as one: texts and lists one after the other, objects field by field; else the last that
    there is."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {name: added(old.get(name), value) for name, value in new.items()}
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    if isinstance(old, list) and isinstance(new, list):
        return [*old, *new]
    return old if new is None else new


def _of_choices(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of /v1/completions and /v1/chat/completions."""
    choices: dict[Any, Any] = {}
    for event in events:
        listed = event.get("choices")
        for choice in listed if isinstance(listed, list) else ():
            number = choice.get("index") if isinstance(choice, dict) else None
            if type(number) is not int:
                raise ReceiptError("expected chunks whose choices have an index")
            choices[number] = added(choices.get(number), choice)
    return dict(choices=[choices[number] for number in sorted(choices)])


def _of_responses(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of /v1/responses, whose last event has the whole answer."""
    found = [event["response"] for event in events if isinstance(event.get("response"), dict)]
    if not found or "receipt" not in found[-1]:
        raise ReceiptError("expected the last event of the stream, which has the receipt")
    pieces = [str(event.get("delta")) for event in events if event.get("type") == "response.output_text.delta"]
    items = found[-1].get("output") or []
    parts = [part for item in items if item.get("type") == "message" for part in item.get("content") or []]
    if pieces and "".join(pieces) != "".join(str(part.get("text")) for part in parts):
        raise ReceiptError("the text of the stream's events is not that of its last event")
    return found[-1]


def _of_messages(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of /v1/messages."""
    blocks: dict[Any, Any] = {}
    for event in events:
        if event.get("type") == "content_block_start":
            blocks[event.get("index")] = event.get("content_block")
        delta = event.get("delta")
        if event.get("type") == "content_block_delta" and isinstance(delta, dict):
            pieces = {name: value for name, value in delta.items() if name != "type"}
            blocks[event.get("index")] = added(blocks.get(event.get("index"), {}), pieces)
    [end] = [event for event in events if event.get("type") == "message_delta"][-1:]
    return end | dict(type="message", content=list(blocks.values()))
