"""Answers of a batch without what depends on the moment: times, random ids, and what the caches had."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

from lockstep.serve.answers.json_response import to_json

ID_LETTERS = 9  # of a tool call's id, see `events.new_id`
TIMES = ("created", "created_at")
PREFIXES = dict(message="msg", reasoning="rs", function_call="fc")  # of ids of /v1/responses


def settled(answer: bytes, key: bytes) -> bytes:
    """The JSON of an answer with success as a batch has it. key: of its line.

    Times are 0, ids are made of the key, cached tokens count as computed ones, and nothing is said of drafts.
    """
    value, ids = json.loads(answer), _ids(key)
    value |= {name: 0 for name in TIMES if name in value}
    if isinstance(value.get("usage"), dict):
        _settle_usage(value["usage"])
    for choice in value.get("choices", ()):
        for call in choice.get("message", {}).get("tool_calls", ()):
            call["id"] = next(ids)
    for item in value.get("output", ()):
        item["id"] = f"{PREFIXES[item['type']]}_{next(ids)}"
        if "call_id" in item:
            item["call_id"] = f"call_{next(ids)}"
    for block in _calls_of_message(value):
        block["id"] = f"toolu_{next(ids)}"
    return to_json(value)


def _ids(key: bytes) -> Iterator[str]:
    """Yields ids, the same for the same key."""
    for number in itertools.count():
        yield hashlib.sha256(b"%b %d" % (key, number)).hexdigest()[:ID_LETTERS]


def _settle_usage(usage: dict[str, Any]) -> None:
    usage.pop("completion_tokens_details", None)
    for name in ("prompt_tokens_details", "input_tokens_details"):
        if name in usage:
            usage[name]["cached_tokens"] = 0
    cached = usage.get("cache_read_input_tokens")
    if cached is not None:
        usage["input_tokens"] += cached
        usage["cache_read_input_tokens"] = 0


def _calls_of_message(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The tool calls in an answer of /v1/messages."""
    content = value.get("content")
    return [each for each in content if each.get("type") == "tool_use"] if isinstance(content, list) else []
