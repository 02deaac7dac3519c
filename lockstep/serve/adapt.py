"""Conversations put so that a chat template says all of them, whatever it can say: see template_abilities.py."""
from itertools import takewhile

from lockstep.serve.tool_calls.tools import as_call, written_out


def adapted(messages, use, abilities):
    """Messages for a template with these Abilities."""
    if not abilities.several_calls:
        messages = one_call_each(messages)
    messages = [_written(message, abilities) for message in messages]
    if use.tools and abilities.tools is None:
        messages = _with_instructions(messages, written_out(use))
    return _with_systems(messages, abilities)


def one_call_each(messages):
    """Several calls in one message as messages of their own, each before its result."""
    made, at = [], 0
    while at < len(messages):
        results = list(takewhile(lambda message: message["role"] == "tool", messages[at + 1:]))
        made += _separated(messages[at], results)
        at += 1 + len(results)
    return made


def _separated(message, results):
    calls = message.get("tool_calls") or ()
    if len(calls) < 2:
        return [message, *results]
    made = []
    for call in calls:
        made.append(message | dict(tool_calls=[call]))
        made += [result for result in results if result.get("tool_call_id") == call["id"]]
        results = [result for result in results if result.get("tool_call_id") != call["id"]]
        message = dict(role="assistant", content="")
    return made + results


def _written(message, abilities):
    """A message whose calls, or what they gave, are a part of its text where the template would not show them."""
    content = message.get("content") or ""
    if message["role"] == "tool" and not abilities.results:
        return dict(role="user", content=f"<tool_response>\n{content}\n</tool_response>")
    if message.get("tool_calls") and not abilities.calls:
        calls = [as_call(call["function"]) for call in message["tool_calls"]]
        kept = {name: value for name, value in message.items() if name != "tool_calls"}
        return kept | dict(content="\n".join([content, *calls] if content else calls))
    return message


def _with_instructions(messages, text):
    first = [_text_of(messages[0]), text] if messages and _is_system(messages[0]) else [text]
    return [dict(role="system", content="\n\n".join(first)), *messages[len(first) - 1:]]


def _with_systems(messages, abilities):
    """Messages with only such of the system as the template shows, and no more of the user in a row than it takes."""
    systems = list(takewhile(_is_system, messages))
    others = messages[len(systems):]
    if len(systems) > 1 and not abilities.several_systems:
        systems = [_as_one(systems)]
    if not abilities.system:
        systems, others = [], [message | dict(role="user") for message in systems] + others
    if not abilities.late_systems:
        others = [message | dict(role="user") if _is_system(message) else message for message in others]
    made = list(systems)
    for message in others:
        _add(made, message, abilities)
    return made


def _add(made, message, abilities):
    before = made[-1]["role"] if made and message["role"] == "user" else None
    if before == "user" and not abilities.several_users:
        made[-1] = _as_one([made[-1], message])
        return
    if before == "tool" and abilities.after_results is not None:
        made.append(dict(role="assistant", content=abilities.after_results))
    made.append(message)


def _as_one(messages):
    return messages[0] | dict(content="\n\n".join(map(_text_of, messages)))


def _is_system(message):
    return message["role"] == "system"


def _text_of(message):
    return message.get("content") or ""
