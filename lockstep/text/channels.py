"""The channels of an answer in OpenAI's Harmony format, which gpt-oss writes.

An answer is one or several messages, each with a header:

    <|channel|>analysis<|message|>A thought.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>The answer.<|return|>

The prompt ends with the first message's <|start|>assistant. Thoughts are in the channel analysis; a message to a
function is a call of it (`tool_calls/harmony.py`); all other messages are the answer's text.
"""

import re

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.events import Content, Event, Parser, Reasoning, partial
from lockstep.text.tool_calls.grammar import Lark
from lockstep.text.tool_calls.harmony import BEGIN, CALL, CHANNEL, END, FUNCTIONS, MESSAGE, RETURN, START

ASSISTANT = f"{START}assistant"
MARKS = (START, CHANNEL, MESSAGE, END, CALL, RETURN)  # which must be in the text that the parser gets
ENDS = (END, CALL, RETURN, START)  # of a message's text; the last where the message has no end
HEADER_STARTS = (START, CHANNEL, MESSAGE, "assistant", "to=")
MAX_HEADER = 512  # characters
RECIPIENT, NAME = re.compile(rf"\bto={re.escape(FUNCTIONS)}([^\s<]+)"), re.compile(rf"{re.escape(CHANNEL)}\s*(\w*)")


def has_channels(template: str) -> bool:
    """Whether a chat template is for a model that writes in channels."""
    return CHANNEL in template and MESSAGE in template and ASSISTANT in template


def beginning(prompt: str) -> str:
    """What a prompt already has of the answer, behind the last <|start|>assistant."""
    _, found, after = prompt.rpartition(ASSISTANT)
    return after if found else ""


def add_rules(lark: Lark, begun: str, answer: str) -> tuple[str, str, str]:
    """Adds grammar rules for a thought before an answer, and for the header of the answer's text.

    begun: of the answer, in the prompt. answer: the expression of its text; empty: there is none. Returns expressions
    for the thought, for the text and for the rule `calls`: where the prompt has begun a message, no thought, the text
    alone, and calls after the end of that message.
    """
    if begun.strip():
        return "", answer, f"{lark.mark(END)} {lark.mark(START)} {quote('assistant')} calls"
    lark.text_until("thought", END)
    analysis = lark.rule("analysis", lark.mark(CHANNEL), quote("analysis"), lark.mark(MESSAGE), "thought")
    thought = lark.rule("before", f"( {analysis} {lark.mark(START)} {quote('assistant')} )?")
    header = [lark.mark(CHANNEL), quote("final"), lark.mark(MESSAGE)]
    return thought, lark.rule("final", *header, answer) if answer else "", "calls"


def as_templates_want(message: dict) -> dict:
    """A message whose thought has the name that templates give it; beside a text, they refuse it. A text of None, which
    they cannot search for marks, becomes an empty one."""
    if message["role"] != "assistant":
        return message
    thought, content = message.get("reasoning_content"), message.get("content") or ""
    return message | dict(content=content) | (dict(thinking=thought) if thought and not content else {})


class ChannelParser:
    """Splits a streamed answer into Reasoning events and the text for another parser, which also gets the calls.

    rest: the Parser of the text. begun: the beginning of the answer that is in the prompt, which has no events. calls:
    whether rest is a CallParser; otherwise calls are text. Text without a header is a text of the answer.
    """

    def __init__(self, rest: Parser, begun: str = "", calls: bool = False) -> None:
        self._rest, self._calls, self._held = rest, calls, ""
        self._in_header, self._is_thought, self._is_call, self._mark = True, False, False, ""
        header, found, _ = begun.rpartition(MESSAGE)
        self.push(header + found)

    @property
    def is_in_call(self) -> bool:
        """Whether the text so far ends inside of a call."""
        return self._rest.is_in_call

    def push(self, text: str) -> list[Event]:
        """The events that this piece of text completes."""
        events: list[Event] = []
        text, self._held = self._held + text, ""
        while text:
            text = self._header(text, events) if self._in_header else self._body(text, events)
        return events

    def finish(self, is_cut: bool = False) -> list[Event]:
        """The remaining events, at the end of the answer. is_cut: the answer reached its maximum length."""
        rest, self._held, events = self._held, "", []
        if not self._in_header or not (rest.isspace() or rest.lstrip().startswith(START[0])):
            self._add(rest, events)
        return events + self._without_mark(self._rest.finish(is_cut))

    # Each of these consumes a part of the text and adds its events. It holds the rest back in `_held` and returns "",
    # or returns the rest for the next of them.

    def _header(self, text: str, events: list[Event]) -> str:
        header, found, body = text.partition(MESSAGE)
        if _is_text(text) or len(header) - (0 if found else partial(text, MESSAGE)) > MAX_HEADER:
            self._in_header, self._is_thought, self._is_call = False, False, False
            return text
        if not found:
            self._held = text
            return ""
        recipient, channel = RECIPIENT.search(header), NAME.search(header)
        self._is_thought = channel is not None and channel[1] == "analysis" and recipient is None
        self._in_header, self._is_call = False, recipient is not None and self._calls
        if recipient is not None and self._is_call:
            self._mark = f"{BEGIN}{recipient[1]}{MESSAGE}"
            events += self._rest.push(self._mark)
        return body

    def _body(self, text: str, events: list[Event]) -> str:
        places = [(at, mark) for mark in ENDS if (at := text.find(mark)) >= 0]
        if not places:
            keep = len(text) - max(partial(text, mark) for mark in ENDS)
            self._add(text[:keep], events)
            self._held = text[keep:]
            return ""
        at, mark = min(places)
        self._add(text[:at], events)
        if self._is_call:
            events += self._without_mark(self._rest.push(CALL))
        self._in_header, self._is_call = True, False
        return text[at + len(mark) :]

    def _add(self, text: str, events: list[Event]) -> None:
        if text:
            events += [Reasoning(text)] if self._is_thought else self._without_mark(self._rest.push(text))

    def _without_mark(self, events: list[Event]) -> list[Event]:
        """Events of the rest, where a call that cannot be read is the text of its message alone: the mark before it is
        this parser's own."""
        made: list[Event] = []
        for event in events:
            if self._is_call and isinstance(event, Content) and self._mark in event.text:
                self._is_call = False
                event = Content(event.text.replace(self._mark, "", 1))
            made += [event] if not isinstance(event, Content) or event.text else []
        return made


def _is_text(text: str) -> bool:
    """Whether what stands where a header is expected does not begin with one."""
    begin = text.lstrip()
    return not any(begin.startswith(start) or start.startswith(begin) for start in HEADER_STARTS)
