"""Turns a conversation into a prompt, a logits mask that enforces the form of the answer, and a parser of the answer.

Each conversation route of the server (chat, responses, messages) makes a Conversation of its request, and `ChatModel`
prepares it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lockstep.text import channels, reasoning
from lockstep.text.channels import ChannelParser
from lockstep.text.grammars import structured
from lockstep.text.grammars.structured import Grammars
from lockstep.text.reasoning import PlainParser, ThoughtParser
from lockstep.text.templates.abilities import CUT, abilities_of
from lockstep.text.templates.beside_calls import rendered
from lockstep.text.templates.fallbacks import adapted
from lockstep.text.tokenizer.tokenizer import Tokenizer
from lockstep.text.tool_calls.events import Parser, short_id
from lockstep.text.tool_calls.grammar import Lark
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import MISTRAL
from lockstep.text.tool_calls.tools import Tool, ToolUse

MAX_TRIES = 64  # trial compilations that look for the tools whose schemas cannot be enforced


T = TypeVar("T")
Mask = Callable[[list[int]], Any] | None


@dataclass(frozen=True)
class Conversation:
    """A request of a conversation route, independent of the API it came through.

    messages: in the form of chat templates; the arguments of tool calls are objects, not JSON text. grammar: for the
    text of the answer, made by grammars/structured.py. form: the request's field that asks for the grammar, for error
    messages. variables: of the chat template. continues: the last message is the beginning of the answer.
    """

    messages: list[dict]
    tools: ToolUse = ToolUse()
    grammar: str | None = None
    variables: Mapping = field(default_factory=dict)
    continues: bool = False
    form: str = "grammar"


@dataclass(frozen=True)
class Prepared:
    """A Conversation that is ready to run.

    ids: of the prompt. options: arguments for SamplingParams. new_parser: makes a Parser (tool_calls/events.py) for the
    text of one sample.
    """

    ids: list[int]
    options: dict[str, Any]
    new_parser: Callable[[], Parser]


class ChatModel:
    """Prepares Conversations for one model, by its tokenizer and chat template. Any thread may use it.

    max_context: a prompt with far more tokens is refused before all of it is tokenized. thinking: the ThinkingSwitch of
    the model's template, or None.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_ids: Iterable[int], vocab_size: int, max_context: int | None = None
    ) -> None:
        self._tokenizer, self._max_context = tokenizer, max_context
        self.grammars = Grammars(tokenizer, eos_ids, vocab_size)
        template = "\n".join(tokenizer.chat_templates.values())
        self._abilities, self._without_tools = abilities_of(tokenizer), abilities_of(tokenizer, with_tools=False)
        self.style, self._marks = self._abilities.style, reasoning.marks_of(template)
        self._has_channels = channels.has_channels(template)
        self._shows_blocks = self._marks is reasoning.MISTRAL and reasoning.shows_blocks(tokenizer.render_chat)
        hello = [dict(role="user", content="Hello.")]
        self.thinking = reasoning.thinking_switch(functools.partial(tokenizer.render_chat, hello))
        added = tokenizer.backend.get_added_tokens_decoder()
        self._added = {token.content: token_id for token_id, token in added.items()}
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}

    def prepare(self, conversation: Conversation, num_samples: int = 1) -> Prepared:
        """Renders and tokenizes the prompt and compiles the grammar, which can take seconds. num_samples: that one mask
        serves.

        ValueError if the model has no chat template, the template refuses the messages, the prompt is far too long, or
        the grammar is wrong.
        """
        prompt = self.prompt(conversation)
        uses_tools, thoughts = bool(conversation.tools.tools), self._marks
        options: dict[str, Any] = dict(logits_mask=self.mask(conversation, prompt, num_samples))
        marks = (self.style.begin, *self.style.after) if uses_tools else ()
        marks += channels.MARKS if self._has_channels else ()
        if self._special.keys() & {*marks, *((thoughts.open, thoughts.close) if thoughts else ())}:
            options["skip_special_tokens"] = False  # the parser needs the marks in the text

        def new_parser():
            parser = CallParser(self.style, conversation.tools) if uses_tools else PlainParser()
            if self._has_channels:
                return ChannelParser(parser, channels.beginning(prompt), uses_tools)
            return ThoughtParser(parser, thoughts.is_open(prompt), thoughts) if thoughts else parser

        ids = self._tokenizer.encode(prompt, add_special_tokens=False, max_tokens=self._max_context)
        return Prepared(ids, options, new_parser)

    def prompt(self, conversation: Conversation, asks: bool = True) -> str:
        """The text of the prompt. asks: whether it ends with the beginning of the assistant's turn
        (add_generation_prompt). ValueError if the model has no chat template, or the template refuses the messages."""
        messages, use, variables = conversation.messages, conversation.tools, conversation.variables
        abilities = self._abilities if use.tools else self._without_tools
        if not abilities.developer:
            messages = [m | dict(role="system") if m["role"] == "developer" else m for m in messages]
        if self.style.begin == MISTRAL.begin:
            messages = [with_short_ids(message) for message in messages]
        if self._has_channels:
            messages = [channels.as_templates_want(message) for message in messages]
        messages, asks = adapted(messages, use, abilities), asks and not conversation.continues
        if conversation.continues:
            last = messages[-1]
            messages = [*messages[:-1], last | dict(content=(last["content"] or "") + CUT)]
        if self._shows_blocks:
            messages = [
                message if message.get("tool_calls") and not abilities.beside_calls else reasoning.in_blocks(message)
                for message in messages
            ]
        text = rendered(self._tokenizer, abilities, messages, use.tools, add_generation_prompt=asks, **variables)
        return text.partition(CUT)[0] if conversation.continues else text

    # ------------------------------------------------------------ constrained decoding

    def mask(self, conversation: Conversation, prompt: str, num_samples: int) -> Mask:
        """The logits mask for the answer; None where any text is allowed."""
        use, grammar = conversation.tools, conversation.grammar
        if not use.must_call and grammar is None:
            return self._mask_of_free_calls(use, prompt, num_samples) if use.tools else None
        parts = [*(["calls"] if use.tools else []), *(["@answer"] if not use.must_call else [])]
        if grammar is not None and parts == ["@answer"] and not self._around_answer(Lark(self._special), prompt, "")[0]:
            with structured.errors_about(conversation.form):
                return self.grammars.mask(grammar, num_samples)

        def mask_with(tools):
            rules = Lark(self._special)
            before, answer, calls = self._around_answer(rules, prompt, "@answer" if "@answer" in parts else "")
            options = [answer if part == "@answer" else calls for part in parts]
            rules.rule("start", before, f"({' | '.join(options)})")
            if tools:
                self._add_calls(rules, tools, use.parallel and self._abilities.several_calls)
            return self.grammars.mask(structured.compose(rules.text, None if use.must_call else grammar), num_samples)

        return self._with_enforceable(use.callable, mask_with, conversation.form if grammar else "tools")

    def _around_answer(self, rules: Lark, prompt: str, answer: str) -> tuple[str, str, str]:
        """The expressions for a thought before the answer, empty if there is none, for the answer's text and for its
        calls, whose rules are added to `rules`. answer: the expression of the text itself; empty: there is none."""
        if self._has_channels:
            return channels.add_rules(rules, channels.beginning(prompt), answer)
        if self._marks is None or self._marks.is_closed(prompt):
            return "", answer, "calls"
        return reasoning.add_rules(rules, self._marks, self._marks.is_open(prompt)), answer, "calls"

    def _mask_of_free_calls(self, use: ToolUse, prompt: str, num_samples: int) -> Mask:
        """A mask for tool_choice "auto": free text, but after the mark of a call comes a valid call.

        None where the mark is no single token, or the schemas cannot be enforced."""
        trigger = self._added.get(self.style.begin)
        if trigger is None:
            return None
        before, after = self._around_thoughts(prompt)
        parallel = use.parallel and self._abilities.several_calls
        try:
            return self._with_enforceable(
                use.callable,
                lambda tools: self.grammars.mask(
                    self._calls_grammar(tools, parallel, "call"), num_samples, trigger, after, not use.parallel, before
                ),
            )
        except ValueError:
            if any(tool.strict for tool in use.tools):
                raise
            return None

    def _around_thoughts(self, prompt: str) -> tuple[int | None, int | None]:
        """(the token that opens a thought, unless the prompt has opened it; the one that closes it): the mark of a call
        within a thought begins no call. None for marks that are no tokens."""
        thoughts = self._marks
        opening, closing = (
            (self._added.get(thoughts.open), self._added.get(thoughts.close)) if thoughts else (None,) * 2
        )
        if thoughts and thoughts.is_open(prompt):
            return None, closing
        return (opening, closing) if opening is not None and closing is not None else (None, None)

    def _calls_grammar(self, tools: list[Tool], parallel: bool, start: str) -> str:
        rules = Lark(self._special)
        rules.rule("start", start)
        self._add_calls(rules, tools, parallel)
        return structured.compose(rules.text)

    def _add_calls(self, rules: Lark, tools: list[Tool], parallel: bool) -> None:
        for tool in tools:
            if tool.strict and self.style.takes_apart:
                self.grammars.check(structured.json_schema(tool.arguments))
        self.style.rules(rules, tools, parallel)

    def _with_enforceable(self, tools: list[Tool], make: Callable[[list[Tool]], T], form: str = "tools") -> T:
        """make(tools), or, where a schema cannot be enforced, make() of the tools without the schemas that cannot be.

        So one tool's schema does not weaken the tools beside it. If the tool is strict, its schema is an error instead,
        which names the tool; an error that no tool causes names `form`, the field that asks for the answer's form.
        """
        try:
            return make(tools)
        except structured.TooSlow:
            raise
        except ValueError:
            good = self._enforceable([tool for tool in tools if not tool.strict])
        loose = [tool if tool.strict or tool.name in good else tool.without_schema() for tool in tools]
        for tool in [tool for tool in tools if tool.strict][:MAX_TRIES]:
            with structured.errors_about(f"tools: parameters of {tool.name}"):
                self.grammars.check(self._calls_grammar([tool], False, "calls"))
        with structured.errors_about(form):
            return make(loose)

    def _enforceable(self, tools: list[Tool]) -> set[str]:
        """The names of the tools whose schemas can be enforced, found by bisection. It stops after MAX_TRIES trials, so
        that among many bad schemas some good ones may be missed."""
        good, groups, tries = set(), [tools] if tools else [], 0
        while groups and tries < MAX_TRIES:
            group, tries = groups.pop(), tries + 1
            if self._compiles(group):
                good |= {tool.name for tool in group}
            elif len(group) > 1:
                groups += [group[len(group) // 2 :], group[: len(group) // 2]]
        return good

    def _compiles(self, tools: list[Tool]) -> bool:
        try:
            self.grammars.check(self._calls_grammar(tools, False, "calls"))
        except structured.TooSlow:
            raise
        except ValueError:
            return False
        return True


def with_short_ids(message: dict) -> dict:
    """The message with ids of tool calls in the form that Mistral's templates accept: nine letters or digits."""
    changed = dict(message)
    if "tool_call_id" in changed:
        changed["tool_call_id"] = short_id(changed["tool_call_id"])
    if "tool_calls" in changed:
        changed["tool_calls"] = [call | dict(id=short_id(call["id"])) for call in changed["tool_calls"]]
    return changed
