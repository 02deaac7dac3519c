"""Rewrites conversations so that a chat template shows all of their content, whichever messages it supports.

The supported kinds of messages are a template's Abilities (abilities.py). use: the conversation's ToolUse.
"""

from itertools import takewhile

from lockstep.text.tool_calls.tools import HOW_TO_CALL, written_out

TEXTS = ("content", "reasoning_content")  # the fields of a message that hold text
RESPONSES = "tool_responses"  # the field of a message with calls that holds their results, in some templates


def adapted(messages, use, abilities):
    """The messages, rewritten for a template with these Abilities."""
    if not abilities.several_calls:
        messages = one_call_each(messages)
    messages = [_written(message, abilities) for message in messages]
    if not (abilities.several_users and abilities.several_assistants):
        messages = [
            _as_text(message, abilities) if _lacks_results(messages, at) else message
            for at, message in enumerate(messages)
        ]
    if use.tools and not abilities.teaches:
        messages = _with_instructions(messages, written_out(use) if abilities.tools is None else HOW_TO_CALL)
    return _with_systems(messages, abilities)


def one_call_each(messages):
    """Splits each message with several calls into messages with one call, each followed by the call's result."""
    split, at = [], 0
    while at < len(messages):
        results = list(takewhile(lambda message: message["role"] == "tool", messages[at + 1 :]))
        split += _separated(messages[at], results)
        at += 1 + len(results)
    return split


def results_inside(messages):
    """The messages with each result in the message of its call, as the field RESPONSES; the text with which the
    assistant goes on is that message's, too: to the model all of it is one turn."""
    made, names = [], {}
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls") or ()}
        last = made[-1] if made else {}
        responses = list(last.get(RESPONSES) or ())
        if message["role"] == "tool" and last.get("tool_calls"):
            name = names.get(message.get("tool_call_id"), "unknown")
            made[-1] = last | {RESPONSES: [*responses, dict(name=name, response=message["content"])]}
        elif message["role"] == "assistant" and responses and not (last["content"] or message.get("tool_calls")):
            made[-1] = last | dict(content=message["content"])
        else:
            made.append(message)
    return made


def _separated(message, results):
    calls = message.get("tool_calls") or ()
    if len(calls) < 2:
        return [message, *results]
    split = []
    for call in calls:
        split.append(message | dict(tool_calls=[call]))
        split += [result for result in results if result.get("tool_call_id") == call["id"]]
        results = [result for result in results if result.get("tool_call_id") != call["id"]]
        message = dict(role="assistant", content="")
    return split + results


def _written(message, abilities):
    """The message with its calls, or the tool result, written into its text where the template would not show them."""
    content = message.get("content") or ""
    if message["role"] == "tool" and not abilities.results:
        return dict(role="user", content=f"<tool_response>\n{content}\n</tool_response>")
    return message if abilities.calls else _as_text(message, abilities)


def _as_text(message, abilities):
    """The message with its calls written into its text, as the model writes them."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    if not functions:
        return message
    calls = abilities.style.write([dict(name=each["name"], arguments=each["arguments"]) for each in functions])
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return kept | dict(content="\n".join(filter(None, [_text_of(message), calls])))


def _lacks_results(messages, at) -> bool:
    """Whether a message has calls, and the next message is no tool result, though there is one."""
    following = messages[at + 1 : at + 2]
    return bool(messages[at].get("tool_calls")) and bool(following) and following[0]["role"] != "tool"


def _with_instructions(messages, text):
    first = [_text_of(messages[0]), text] if messages and _is_system(messages[0]) else [text]
    return [dict(role="system", content="\n\n".join(first)), *messages[len(first) - 1 :]]


def _with_systems(messages, abilities):
    """The messages with system messages joined, moved or turned into user messages where the template needs that, and
    with user and assistant messages joined or added where it wants the two to alternate."""
    systems = list(takewhile(_is_system, messages))
    others = messages[len(systems) :]
    if len(systems) > 1 and not abilities.several_systems:
        systems = [_as_one(systems)]
    drops = not abilities.system_at_results and bool(others) and others[-1]["role"] == "tool"
    if not abilities.system or drops:
        systems, others = [], [message | dict(role="user") for message in systems] + others
    if not abilities.late_systems:
        others = [message | dict(role="user") if _is_system(message) else message for message in others]
    adapted_messages = list(systems)
    if others and others[0]["role"] == "assistant" and abilities.opening is not None:
        adapted_messages.append(dict(role="user", content=abilities.opening))
    for message in others:
        _append(adapted_messages, message, abilities)
    return adapted_messages


def _append(messages, message, abilities) -> None:
    """Appends a message; joins it with the last one where the template shows only one message of a role in a row."""
    roles = messages[-1]["role"] if messages else None, message["role"]
    joins = dict(user=not abilities.several_users, assistant=not abilities.several_assistants)
    if roles[0] == roles[1] and joins.get(message["role"]):
        messages[-1] = _as_one([messages[-1], message])
        return
    if roles == ("tool", "user") and abilities.after_results is not None:
        messages.append(dict(role="assistant", content=abilities.after_results))
    messages.append(message)


def _as_one(messages):
    """Joins messages of one role: their texts, one after the other, and the other fields, such as calls, of the last
    message that has them."""
    texts = {
        name: "\n\n".join(filter(None, (message.get(name) for message in messages)))
        for name in TEXTS
        if name == "content" or any(message.get(name) for message in messages)
    }
    return messages[0] | messages[-1] | texts


def _is_system(message) -> bool:
    return message["role"] == "system"


def _text_of(message):
    return message.get("content") or ""
