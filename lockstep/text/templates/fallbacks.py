"""Conversations put so that a chat template says all of them, whatever it can say: see template_abilities.py."""

from itertools import takewhile

from lockstep.text.tool_calls.tools import HOW_TO_CALL, as_call, written_out

SPOKEN = ("content", "reasoning_content")


def adapted(messages, use, abilities):
    """Messages for a template with these Abilities."""
    if not abilities.several_calls:
        messages = one_call_each(messages)
    messages = [_written(message, abilities) for message in messages]
    if not (abilities.several_users and abilities.several_assistants):
        messages = [
            _as_text(message) if _lacks_results(messages, at) else message for at, message in enumerate(messages)
        ]
    if use.tools and not abilities.teaches:
        messages = _with_instructions(messages, written_out(use) if abilities.tools is None else HOW_TO_CALL)
    return _with_systems(messages, abilities)


def one_call_each(messages):
    """Several calls in one message as messages of their own, each before its result."""
    made, at = [], 0
    while at < len(messages):
        results = list(takewhile(lambda message: message["role"] == "tool", messages[at + 1 :]))
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
    return message if abilities.calls else _as_text(message)


def _as_text(message):
    """A message whose calls are a part of its text."""
    calls = [as_call(call["function"]) for call in message.get("tool_calls") or ()]
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return kept | dict(content="\n".join(filter(None, [_text_of(message), *calls]))) if calls else message


def _lacks_results(messages, at) -> bool:
    """Whether a message has calls that nothing answers, though the conversation goes on: no turn of the tools."""
    following = messages[at + 1 : at + 2]
    return bool(messages[at].get("tool_calls")) and bool(following) and following[0]["role"] != "tool"


def _with_instructions(messages, text):
    first = [_text_of(messages[0]), text] if messages and _is_system(messages[0]) else [text]
    return [dict(role="system", content="\n\n".join(first)), *messages[len(first) - 1 :]]


def _with_systems(messages, abilities):
    """Messages with only such of the system as the template shows, and with turns where it wants turns."""
    systems = list(takewhile(_is_system, messages))
    others = messages[len(systems) :]
    if len(systems) > 1 and not abilities.several_systems:
        systems = [_as_one(systems)]
    drops = not abilities.system_at_results and bool(others) and others[-1]["role"] == "tool"
    if not abilities.system or drops:
        systems, others = [], [message | dict(role="user") for message in systems] + others
    if not abilities.late_systems:
        others = [message | dict(role="user") if _is_system(message) else message for message in others]
    made = list(systems)
    if others and others[0]["role"] == "assistant" and abilities.opening is not None:
        made.append(dict(role="user", content=abilities.opening))
    for message in others:
        _add(made, message, abilities)
    return made


def _add(made, message, abilities) -> None:
    roles = made[-1]["role"] if made else None, message["role"]
    joins = dict(user=not abilities.several_users, assistant=not abilities.several_assistants)
    if roles[0] == roles[1] and joins.get(message["role"]):
        made[-1] = _as_one([made[-1], message])
        return
    if roles == ("tool", "user") and abilities.after_results is not None:
        made.append(dict(role="assistant", content=abilities.after_results))
    made.append(message)


def _as_one(messages):
    """Messages of one role as one: their texts, and what else the last of them has, such as calls."""
    texts = {
        name: "\n\n".join(filter(None, (message.get(name) for message in messages)))
        for name in SPOKEN
        if name == "content" or any(message.get(name) for message in messages)
    }
    return messages[0] | messages[-1] | texts


def _is_system(message) -> bool:
    return message["role"] == "system"


def _text_of(message):
    return message.get("content") or ""
