"""Reasoning: the thought, <think>...</think>, that a model writes before its answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.text.tool_calls.events import Content, Event, Parser, Reasoning, partial
from lockstep.text.tool_calls.grammar import Lark

OPEN, CLOSE = "<think>", "</think>"
# Variables of chat templates that a request may set. Names that replace the template or its rendering are not here.
TEMPLATE_VARIABLES = frozenset(
    """enable_thinking thinking thinking_budget reasoning_effort reasoning preserve_thinking
    clear_thinking custom_instructions date_string system_prompt xml_tools python_tools builtin_tools
    tools_in_user_message""".split()
)
SWITCHES = ("enable_thinking", "thinking", "reasoning")  # variables that switch thinking on (True) and off (False)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_VARIABLE_CHARS = 10_000


def thinks(template: str) -> bool:
    """Whether a chat template is for a model that can write thoughts."""
    return CLOSE in template


def is_open(prompt: str) -> bool:
    """Whether a prompt ends inside of a thought, so that the answer continues the thought."""
    return prompt.rstrip().endswith(OPEN)


def is_closed(prompt: str) -> bool:
    """Whether a prompt ends with a complete thought, so that the answer has none: thinking was switched off."""
    return prompt.rstrip().endswith(CLOSE)


def switch_of(prompt_with: Callable[..., str]) -> str | None:
    """The variable by which a chat template switches thinking on and off; None if it has no such switch.

    prompt_with: renders a prompt with the variables that it is given. A template has the switch whose two values give
    two prompts, whatever its source says.
    """
    return next((name for name in SWITCHES if prompt_with(**{name: True}) != prompt_with(**{name: False})), None)


@dataclass(frozen=True)
class ThinkingSwitch:
    """How a request switches thinking on and off. variable: of the chat template, as `switch_of` finds it. default:
    whether the model may think where a request does not set it."""

    variable: str
    default: bool


def thinking_switch(prompt_with: Callable[..., str]) -> ThinkingSwitch | None:
    """The ThinkingSwitch of a chat template; None if it has none, or refuses to be rendered. prompt_with: as for
    `switch_of`."""
    try:
        variable = switch_of(prompt_with)
        if variable is None:
            return None
        return ThinkingSwitch(variable, default=prompt_with() != prompt_with(**{variable: False}))
    except ValueError:
        return None


def add_rules(lark: Lark, opened: bool) -> str:
    """Adds grammar rules for a thought; returns the expression that stands for it in another rule.

    opened: the prompt has begun the thought; otherwise the thought is optional."""
    lark.text_until("thought", CLOSE)
    parts = ["thought", r"/\n{0,2}/"]
    return " ".join(parts if opened else ["(", lark.mark(OPEN), *parts, ")?"])


def template_variables(given: Mapping[str, Any] | None, effort: str | None = None) -> dict[str, Any]:
    """The variables for a chat template that a request sets. ValueError for one that may not be set.

    effort: OpenAI's reasoning_effort; "none" switches thinking off where the template can.
    """
    variables = {}
    if effort is not None:
        if effort not in EFFORTS:
            raise ValueError(f"reasoning_effort: expected one of {', '.join(EFFORTS)}, got {effort!r:.80}")
        variables = dict(reasoning_effort=effort, enable_thinking=effort != "none")
    for name, value in (given or {}).items():
        if name not in TEMPLATE_VARIABLES:
            allowed = ", ".join(sorted(TEMPLATE_VARIABLES))
            raise ValueError(f"chat_template_kwargs: {name[:80]!r} cannot be set, only {allowed}")
        if not _is_plain(value):
            raise ValueError(
                f"chat_template_kwargs: {name}: expected a text, number, true, false, null or a list of "
                f"those, got {value!r:.80}"
            )
        variables[name] = value
    return variables


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 100 and not any(isinstance(v, list) for v in value) and all(map(_is_plain, value))
    is_text = isinstance(value, str) and len(value) <= MAX_VARIABLE_CHARS
    return value is None or is_text or isinstance(value, (bool, int, float))


class ThoughtParser:
    """Splits a streamed answer into Reasoning events and the text after the thought, which goes to another parser.

    rest: the Parser of the text after the thought. opened: the answer begins inside of a thought. White space around
    the thought is dropped.
    """

    def __init__(self, rest: Parser, opened: bool = False) -> None:
        self._rest, self._held = rest, ""
        self._state = self._inside_start if opened else self._before

    def push(self, text: str) -> list[Event]:
        """The events that this piece of text completes."""
        if self._state == self._outside:
            return self._rest.push(text)
        events: list[Event] = []
        text, self._held, state = self._held + text, "", None
        while state != self._state:
            state = self._state
            text = state(text, events)
        return events

    def finish(self, is_cut: bool = False) -> list[Event]:
        """The remaining events, at the end of the answer. is_cut: the answer reached its maximum length."""
        rest, self._held = self._held, ""
        inside = self._state in (self._inside_start, self._inside)
        events: list[Event] = self._rest.push(rest) if rest and not inside else []
        if inside and rest.strip():
            events = [Reasoning(rest)]
        return events + self._rest.finish(is_cut)

    # Each state consumes a part of the text and adds its events. It holds the rest back in `_held` and returns "", or
    # returns the rest for the next state.

    def _before(self, text: str, events: list[Event]) -> str:
        stripped = text.lstrip()
        if stripped.startswith(OPEN):
            self._state = self._inside_start
            return stripped[len(OPEN) :]
        if OPEN.startswith(stripped):
            self._held = text
            return ""
        self._state = self._outside
        return text

    def _inside_start(self, text: str, events: list[Event]) -> str:
        text = text.lstrip()
        if text:
            self._state = self._inside
        return text

    def _inside(self, text: str, events: list[Event]) -> str:
        at = text.find(CLOSE)
        if at < 0:
            keep = len(text[: len(text) - partial(text, CLOSE)].rstrip())
            self._held, text = text[keep:], text[:keep]
        thought = text if at < 0 else text[:at].rstrip()
        if thought:
            events.append(Reasoning(thought))
        if at < 0:
            return ""
        self._state = self._after
        return text[at + len(CLOSE) :]

    def _after(self, text: str, events: list[Event]) -> str:
        text = text.lstrip()
        if text:
            self._state = self._outside
        return text

    def _outside(self, text: str, events: list[Event]) -> str:
        events += self._rest.push(text)
        return ""


class PlainParser:
    """A Parser that turns every piece of text into Content."""

    def push(self, text: str) -> list[Event]:
        """The events of a piece of text."""
        return [Content(text)] if text else []

    def finish(self, is_cut: bool = False) -> list[Event]:
        """No events: no text is ever held back."""
        return []
