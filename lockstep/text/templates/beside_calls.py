"""An assistant's text in a message with tool calls, for chat templates that show only the calls, or show it after them.

A model writes such text before its calls, in the same turn, so the text is inserted there into the rendered prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count

from lockstep.text.templates.abilities import Abilities, abilities_of, render
from lockstep.text.templates.chat_template import check_messages
from lockstep.text.templates.fallbacks import adapted, results_inside
from lockstep.text.tool_calls.styles import Style
from lockstep.text.tool_calls.tools import Tool, ToolUse


def prompts_without_tools(tokenizer) -> Callable[..., str]:
    """The function that renders messages, with variables of the chat template, to the text of a prompt.

    The template is probed once, here. Messages whose content is a list of parts, not a text, reach it unchanged.
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
    """The text of a prompt, as `render` makes it, but with the texts of messages that have calls in any case."""
    beside = {
        number: content
        for number, message in enumerate(messages)
        if message.get("tool_calls") and isinstance(content := message.get("content"), str) and content
    }
    placed = results_inside if abilities.inside else list
    if abilities.beside_calls or not beside:
        return render(tokenizer, abilities.tools, placed(messages), tools, **variables)
    all_texts = repr(messages)
    mark = next(unused for n in count() if (unused := f"call{n}of") not in all_texts)
    marked = [
        _marked(message, f"{mark}{number}_") if number in beside else message for number, message in enumerate(messages)
    ]
    text = render(tokenizer, abilities.tools, placed(marked), tools, **variables)
    for number, content in beside.items():
        text = _with_text(text, f"{mark}{number}_", content, abilities.style)
    return text


def _marked(message: Mapping, mark: str) -> dict:
    """The message without its text, and with a mark put before the function name of its first call."""
    first, *others = message["tool_calls"]
    function = first["function"] | {"name": mark + first["function"]["name"]}
    return {**message, "content": "", "tool_calls": [first | {"function": function}, *others]}


def _with_text(text: str, mark: str, content: str, style: Style) -> str:
    """The prompt with `content` inserted before the call whose name has the mark, and the mark removed; unchanged if
    the mark is not in it."""
    before, found, after = text.partition(mark)
    if not found:
        return text
    begin = max(before.rfind(each) for each in (style.begin, style.first) if each is not None)
    if style.first is not None and before[:begin].rstrip().endswith(style.begin):
        begin = before.rindex(style.begin)
    return f"{before[:begin]}{content}\n{before[begin:]}{after.replace(mark, '')}"
