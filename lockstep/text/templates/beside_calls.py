"""What the assistant said beside its calls, for chat templates that show only the calls.

A model writes such text before its calls, in the same turn, so that is where it is put into the rendered prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count

from lockstep.text.templates.abilities import Abilities, abilities_of, render
from lockstep.text.templates.chat_template import check_messages
from lockstep.text.templates.fallbacks import adapted
from lockstep.text.tool_calls.styles import Style
from lockstep.text.tool_calls.tools import Tool, ToolUse


def prompts_without_tools(tokenizer) -> Callable[..., str]:
    """What turns messages, and variables of the chat template, into the text of a prompt; found out once for a model.

    Messages whose content is no text, as some templates know them, are given to the template as they are.
    """
    abilities = abilities_of(tokenizer, with_tools=False)

    def prompt(messages: Sequence[Mapping], **variables) -> str:
        check_messages(messages)
        plain = [dict(message) for message in messages]
        if all(isinstance(message.get("content"), (str, type(None))) for message in plain):
            plain = adapted(plain, ToolUse(), abilities)
        return rendered(tokenizer, abilities, plain, (), **variables)

    return prompt


def rendered(tokenizer, abilities: Abilities, messages: Sequence[Mapping], tools: Sequence[Tool], **variables) -> str:
    """The text of a prompt; see `render`. Nothing that was said beside calls is missing."""
    beside = {
        number: content
        for number, message in enumerate(messages)
        if message.get("tool_calls") and isinstance(content := message.get("content"), str) and content
    }
    if abilities.beside_calls or not beside:
        return render(tokenizer, abilities.tools, messages, tools, **variables)
    said = repr(messages)
    mark = next(made for n in count() if (made := f"call{n}of") not in said)
    marked = [
        _marked(message, f"{mark}{number}_") if number in beside else message for number, message in enumerate(messages)
    ]
    text = render(tokenizer, abilities.tools, marked, tools, **variables)
    for number, content in beside.items():
        text = _with_text(text, f"{mark}{number}_", content, abilities.style)
    return text


def _marked(message: Mapping, mark: str) -> dict:
    """A message whose first call is of a function of a name that begins with a mark."""
    first, *others = message["tool_calls"]
    function = first["function"] | {"name": mark + first["function"]["name"]}
    return {**message, "tool_calls": [first | {"function": function}, *others]}


def _with_text(text: str, mark: str, content: str, style: Style) -> str:
    """A prompt without the mark, and with `content` before the call that has it; unchanged if no call has it."""
    before, found, after = text.partition(mark)
    if not found:
        return text
    begin = max(before.rfind(each) for each in (style.begin, style.first) if each is not None)
    if style.first is not None and before[:begin].rstrip().endswith(style.begin):
        begin = before.rindex(style.begin)
    return f"{before[:begin]}{content}\n{before[begin:]}{after.replace(mark, '')}"
