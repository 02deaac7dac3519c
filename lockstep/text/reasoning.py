"""What a model thinks before it answers: <think>...</think> in its text."""

from collections.abc import Mapping
from typing import Any

from lockstep.text.tool_calls.events import Content, Event, Parser, Reasoning, partial
from lockstep.text.tool_calls.grammar import Lark

OPEN, CLOSE = "<think>", "</think>"
# Variables of chat templates that a request may set; never a template, nor how it is rendered or tokenized.
TEMPLATE_VARIABLES = frozenset(
    """enable_thinking thinking thinking_budget reasoning_effort reasoning preserve_thinking
    clear_thinking custom_instructions date_string system_prompt xml_tools python_tools builtin_tools
    tools_in_user_message""".split()
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_VARIABLE_CHARS = 10_000


def thinks(template: str) -> bool:
    """Whether a chat template is that of a model that may think."""
    return CLOSE in template


def is_open(prompt: str) -> bool:
    """Whether a prompt ends inside of a thought, which the answer then goes on with."""
    return prompt.rstrip().endswith(OPEN)


def is_closed(prompt: str) -> bool:
    """Whether a prompt ends with a thought, so that the answer has none: thinking was switched off."""
    return prompt.rstrip().endswith(CLOSE)


def add_rules(lark: Lark, opened: bool) -> str:
    """Adds rules for a thought; returns what stands for it in another. opened: the prompt began it, otherwise there
    may be none."""
    lark.text_until("thought", CLOSE)
    parts = ["thought", r"/\n{0,2}/"]
    return " ".join(parts if opened else ["(", lark.mark(OPEN), *parts, ")?"])


def template_variables(given: Mapping[str, Any] | None, effort: str | None = None) -> dict[str, Any]:
    """Checked variables for a chat template. ValueError for one that may not be set.

    effort: OpenAI's reasoning_effort; "none" switches thinking off where the template can.
    """
    made = {}
    if effort is not None:
        if effort not in EFFORTS:
            raise ValueError(f"reasoning_effort: expected one of {', '.join(EFFORTS)}, got {effort!r:.80}")
        made = dict(reasoning_effort=effort, enable_thinking=effort != "none")
    for name, value in (given or {}).items():
        if name not in TEMPLATE_VARIABLES:
            allowed = ", ".join(sorted(TEMPLATE_VARIABLES))
            raise ValueError(f"chat_template_kwargs: {name[:80]!r} cannot be set, only {allowed}")
        if not _is_plain(value):
            raise ValueError(
                f"chat_template_kwargs: {name}: expected a text, number, true, false, null or a list of "
                f"those, got {value!r:.80}"
            )
        made[name] = value
    return made


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 100 and not any(isinstance(v, list) for v in value) and all(map(_is_plain, value))
    is_text = isinstance(value, str) and len(value) <= MAX_VARIABLE_CHARS
    return value is None or is_text or isinstance(value, (bool, int, float))


class ThoughtParser:
    """Splits an answer that comes in pieces into Reasoning and the text after it, which goes to another parser.

    opened: the answer begins inside of a thought. White space around the thought is dropped. rest: anything with
    `push` and `finish` that return events.
    """

    def __init__(self, rest: Parser, opened: bool = False) -> None:
        self._rest, self._held = rest, ""
        self._state = self._inside_start if opened else self._before

    def push(self, text: str) -> list[Event]:
        """The events that a piece of text completes."""
        if self._state == self._outside:
            return self._rest.push(text)
        made: list[Event] = []
        text, self._held, state = self._held + text, "", None
        while state != self._state:
            state = self._state
            text = state(text, made)
        return made

    def finish(self, is_cut: bool = False) -> list[Event]:
        """What was held back, now that nothing follows. is_cut: the answer was as long as it might be."""
        rest, self._held = self._held, ""
        inside = self._state in (self._inside_start, self._inside)
        made: list[Event] = self._rest.push(rest) if rest and not inside else []
        if inside and rest.strip():
            made = [Reasoning(rest)]
        return made + self._rest.finish(is_cut)

    # Each state takes what it can out of the text and either holds the rest back or hands it to the next state.

    def _before(self, text: str, made: list[Event]) -> str:
        stripped = text.lstrip()
        if stripped.startswith(OPEN):
            self._state = self._inside_start
            return stripped[len(OPEN) :]
        if OPEN.startswith(stripped):
            self._held = text
            return ""
        self._state = self._outside
        return text

    def _inside_start(self, text: str, made: list[Event]) -> str:
        text = text.lstrip()
        if text:
            self._state = self._inside
        return text

    def _inside(self, text: str, made: list[Event]) -> str:
        at = text.find(CLOSE)
        if at < 0:
            keep = len(text[: len(text) - partial(text, CLOSE)].rstrip())
            self._held, text = text[keep:], text[:keep]
        thought = text if at < 0 else text[:at].rstrip()
        if thought:
            made.append(Reasoning(thought))
        if at < 0:
            return ""
        self._state = self._after
        return text[at + len(CLOSE) :]

    def _after(self, text: str, made: list[Event]) -> str:
        text = text.lstrip()
        if text:
            self._state = self._outside
        return text

    def _outside(self, text: str, made: list[Event]) -> str:
        made += self._rest.push(text)
        return ""


class PlainParser:
    """Every piece of text is Content."""

    def push(self, text: str) -> list[Event]:
        """The events of a piece of text."""
        return [Content(text)] if text else []

    def finish(self, is_cut: bool = False) -> list[Event]:
        """Nothing is ever held back."""
        return []
