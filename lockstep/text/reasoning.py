"""Reasoning: the thought that a model writes before its answer, between marks: <think>...</think> and other families'.

gpt-oss writes its thoughts into a channel of its own instead: `text/channels.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.events import Content, Event, Parser, Reasoning, partial
from lockstep.text.tool_calls.grammar import Lark

# Variables of chat templates that a request may set. Names that replace the template or its rendering are not here.
TEMPLATE_VARIABLES = frozenset(
    """enable_thinking thinking thinking_budget reasoning_effort reasoning preserve_thinking
    clear_thinking custom_instructions date_string system_prompt xml_tools python_tools builtin_tools
    tools_in_user_message""".split()
)
SWITCHES = ("enable_thinking", "thinking", "reasoning")  # variables that switch thinking on (True) and off (False)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_VARIABLE_CHARS = 10_000


@dataclass(frozen=True)
class Marks:
    """How a family of models marks its thoughts.

    open, close: the marks around a thought. label: a word behind `open` that belongs to the mark. inside: a mark that a
    prompt may write behind `open`, or empty. answer: marks around the answer behind a thought, or None. repeats: the
    marks are tokens that no text has, so that a thought may also come later in an answer, and a `close` without a
    thought is dropped.
    """

    open: str
    close: str
    label: str = ""
    inside: str = ""
    answer: tuple[str, str] | None = None
    repeats: bool = False

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends inside of a thought, so that the answer continues the thought."""
        return prompt.rstrip().removesuffix(self.inside).endswith(self.open + self.label)

    def is_closed(self, prompt: str) -> bool:
        """Whether a prompt ends with a complete thought, so that the answer has none: thinking was switched off."""
        return prompt.rstrip().endswith(self.close)

    def are_in(self, template: str) -> bool:
        """Whether a chat template is for a model that writes these marks."""
        return self.close in template and (self.answer is None or self.answer[0] in template)


THINK = Marks("<think>", "</think>")
GEMMA = Marks("<|channel>", "<channel|>", label="thought", repeats=True)
MISTRAL = Marks("[THINK]", "[/THINK]")
GRANITE = Marks("<think>", "</think>", answer=("<response>", "</response>"))
GRANITE_TEXTS = Marks("Here is my thought process:", "Here is my response:")  # Granite 3.2
SEED = Marks("<seed:think>", "</seed:think>", inside="<seed:cot_budget_reflect>")
MARKS = (GEMMA, MISTRAL, GRANITE, GRANITE_TEXTS, SEED, THINK)  # the first that a template has


def marks_of(template: str) -> Marks | None:
    """The Marks that a chat template is for; None if its model writes no thoughts."""
    return next((marks for marks in MARKS if marks.are_in(template)), None)


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


def in_blocks(message: Mapping) -> dict:
    """An assistant's message with its thought as a block of its content, as Mistral's templates show it."""
    thought = message.get("reasoning_content") if message["role"] == "assistant" else None
    if not thought or not isinstance(message.get("content") or "", str):
        return dict(message)
    blocks = [dict(type="thinking", thinking=thought), dict(type="text", text=message.get("content") or "")]
    return {name: value for name, value in message.items() if name != "reasoning_content"} | dict(content=blocks)


def shows_blocks(prompt_of: Callable[[list[dict]], str]) -> bool:
    """Whether a chat template shows the blocks that `in_blocks` makes. prompt_of: renders messages."""
    answer = dict(role="assistant", content="amberword", reasoning_content="birchword")
    try:
        prompt = prompt_of([dict(role="user", content="Hello."), in_blocks(answer)])
    except ValueError:
        return False
    return "[THINK]birchword" in prompt and "amberword" in prompt


def add_rules(lark: Lark, marks: Marks, opened: bool) -> str:
    """Adds grammar rules for a thought; returns the expression that stands for it in another rule.

    opened: the prompt has begun the thought; otherwise the thought is optional."""
    lark.text_until("thought", marks.close)
    parts = ["thought", r"/\n{0,2}/"]
    if marks.answer:
        parts.append(f"{quote(marks.answer[0])}?")
    label = quote(f"{marks.label}\n") if marks.label else ""
    return " ".join(parts if opened else ["(", lark.mark(marks.open), label, *parts, ")?"])


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

    def __init__(self, rest: Parser, opened: bool = False, marks: Marks = THINK) -> None:
        self._rest, self._marks, self._held = rest, marks, ""
        self._state = self._inside_start if opened else self._before
        self._later = (marks.open, marks.close) if marks.repeats else ()  # marks that may stand in the answer's text

    @property
    def is_in_call(self) -> bool:
        """Whether the text so far ends inside of a call."""
        return self._rest.is_in_call

    def push(self, text: str) -> list[Event]:
        """The events that this piece of text completes."""
        events: list[Event] = []
        text, self._held = self._held + text, ""
        while text:
            text = self._state(text, events)
        return events

    def finish(self, is_cut: bool = False) -> list[Event]:
        """The remaining events, at the end of the answer. is_cut: the answer reached its maximum length."""
        rest, self._held = self._held, ""
        is_thought = self._state in (self._inside_start, self._inside)
        is_text = self._state in (self._before, self._after, self._outside)
        events: list[Event] = self._rest.push(rest) if rest and is_text else []
        if is_thought and rest.strip():
            events = [Reasoning(rest)]
        return events + self._rest.finish(is_cut)

    # Each state consumes a part of the text and adds its events. It holds the rest back in `_held` and returns "", or
    # returns the rest for the next state.

    def _before(self, text: str, events: list[Event]) -> str:
        stripped, mark = text.lstrip(), self._marks.open
        if stripped.startswith(mark):
            self._state = self._label
            return stripped[len(mark) :]
        if mark.startswith(stripped):
            self._held = text
            return ""
        self._state = self._outside
        return text

    def _label(self, text: str, events: list[Event]) -> str:
        label = self._marks.label
        if text != label and label.startswith(text):
            self._held = text
            return ""
        self._state = self._inside_start
        return text.removeprefix(label)

    def _inside_start(self, text: str, events: list[Event]) -> str:
        text = text.lstrip()
        if text:
            self._state = self._inside
        return text

    def _inside(self, text: str, events: list[Event]) -> str:
        mark = self._marks.close
        at = text.find(mark)
        if at < 0:
            keep = len(text[: len(text) - partial(text, mark)].rstrip())
            self._held, text = text[keep:], text[:keep]
        thought = text if at < 0 else text[:at].rstrip()
        if thought:
            events.append(Reasoning(thought))
        if at < 0:
            return ""
        self._state = self._after
        return text[at + len(mark) :]

    def _after(self, text: str, events: list[Event]) -> str:
        text = text.lstrip()
        begin, end = self._marks.answer or ("", "")
        if begin and not self._later and begin.startswith(text[: len(begin)]):
            if len(text) < len(begin):
                self._held = text
                return ""
            self._later = (end,)
            return text[len(begin) :]
        if text:
            self._state = self._outside
        return text

    def _outside(self, text: str, events: list[Event]) -> str:
        places = [(at, mark) for mark in self._later if (at := text.find(mark)) >= 0]
        keep = len(text) - max((partial(text, mark) for mark in self._later), default=0)
        at, mark = min(places, default=(keep, ""))
        if at:
            events += self._rest.push(text[:at])
        if not mark:
            self._held = text[at:]
            return ""
        if self._rest.is_in_call:
            events += self._rest.push(mark)
        elif mark == self._marks.open:
            self._state = self._label
        return text[at + len(mark) :]


class PlainParser:
    """A Parser that turns every piece of text into Content."""

    is_in_call = False

    def push(self, text: str) -> list[Event]:
        """The events of a piece of text."""
        return [Content(text)] if text else []

    def finish(self, is_cut: bool = False) -> list[Event]:
        """No events: no text is ever held back."""
        return []
