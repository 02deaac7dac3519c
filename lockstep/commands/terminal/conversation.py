"""A conversation with a model: its messages, its settings, and the /commands that change them."""

import difflib
import functools
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lockstep.commands.options import AT_ZERO, DRAWN
from lockstep.commands.terminal.answer import answer
from lockstep.commands.terminal.entries import QUOTES, parsed
from lockstep.commands.terminal.errors import is_told, sentence
from lockstep.commands.terminal.output import counted, shown, write
from lockstep.commands.terminal.printer import AnswerPrinter
from lockstep.commands.terminal.totals import Totals
from lockstep.commands.terminal.turn import Turn
from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM
from lockstep.text import conversation as chat
from lockstep.text.reasoning import marks_of

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")
# (names of a /command, the method that does it, its argument, what it does); /help lists them
COMMANDS = (
    (("regenerate", "retry"), "regenerate", "", "answer the last question again, with another seed"),
    (("undo",), "undo", "", "forget the last question and its answer"),
    (("think",), "think", "", "let the model think before it answers"),
    (("nothink", "no_think"), "nothink", "", "let it answer at once"),
    (("reset", "clear"), "reset", "", "forget the conversation"),
    (("system",), "system", "[TEXT]", "set the system message, or remove it; forgets the conversation"),
    (("set",), "set", "[NAME VALUE]", "change a setting, or show all"),
    (("stats",), "stats", "", "tokens and speeds of the last answer, and of all"),
    (("save",), "save", "FILE", "write the conversation as JSON"),
    (("load",), "load", "FILE", "continue a saved one"),
    (("help", "?"), "help", "", "list these commands"),
    (("exit", "quit", "bye"), "exit", "", "end; so does Ctrl-D"),
)
METHODS = {name: method for names, method, *_ in COMMANDS for name in names}
ENTERING = (
    (QUOTES, f"begins and ends a message, or a /command's argument, of several lines: {QUOTES}text{QUOTES}"),
    ("Alt-Enter", "begins a new line; text that is pasted keeps its lines"),
    ("Ctrl-C", "interrupts an answer, or drops what was typed"),
)


class Conversation:
    """The messages so far, which `hear` adds to or changes by what the user enters: a message or a /command.

    Thoughts of the model are shown, but are no part of the messages: chat templates that know thoughts leave those of
    earlier answers out. settings: fields of SamplingParams, of which ValueError for one that is not allowed. thinking:
    whether the model thinks before it answers; None: as its chat template has it.
    """

    def __init__(self, llm: LLM, settings: Mapping[str, Any], system: str | None = None) -> None:
        self.llm, self.settings, self.open = llm, dict(settings), True
        llm.default_params(**settings)
        self.messages: list[Message] = [dict(role="system", content=system)] if system else []
        self.thinking: bool | None = None
        self._asked: list[Message] = []  # the messages up to the last question, also where it got no answer
        self._num_tries = 0  # how often that question was answered again
        self._totals = Totals()
        self._last: Turn | None = None

    def hear(self, entry: str) -> None:
        """Acts on an entry. A user's mistake, or a lack of memory, is printed as a sentence and changes nothing."""
        try:
            name, text = parsed(entry, METHODS)
            if name is not None:
                self._command(name, text)
            elif text.strip():
                self._tell_about(self.ask(text))
        except Exception as error:
            if not is_told(error):
                raise
            tell(sentence(error))

    @property
    def was_interrupted(self) -> bool:
        """Whether Ctrl-C interrupted the last answer."""
        return self._last is not None and self._last.is_interrupted

    @property
    def is_greedy(self) -> bool:
        """Whether answers always take the most probable token, so that no seed changes them."""
        return self.llm.default_params(**self.settings).temperature == 0

    def _tell_about(self, turn: Turn) -> None:
        for remark in turn.remarks:
            tell(remark)

    def _command(self, name: str, argument: str) -> None:
        if name not in METHODS:
            raise ValueError(
                f"/{name}: no such command{_meant(name, METHODS, '/')}; /help lists them, and a message that begins "
                f"with / goes between {QUOTES}"
            )
        getattr(self, f"_{METHODS[name]}")(argument)

    # ------------------------------------------------------------ answers

    def ask(self, question: str) -> Turn:
        """Streams the answer to a question; both become part of the conversation unless the answer has no text."""
        return self._answer([*self.messages, dict(role="user", content=question)], 0)

    def _answer(self, asked: list[Message], num_tries: int) -> Turn:
        """Answers the last of these messages. num_tries: how many other answers it has had, with other seeds."""
        prepared = self._chat.prepare(chat.Conversation(asked, variables=self._variables))
        room = self._room(prepared.ids, any(message["role"] == "assistant" for message in asked))
        params = self._params(room, self.settings.get("seed", 0) + num_tries, prepared.options)
        self._asked, self._num_tries = asked, num_tries
        printer = AnswerPrinter(prepared.new_parser())
        with interruptible() as interrupted:
            stream, timing = answer(self.llm, prepared.ids, params, printer.push, interrupted)
        request = stream.request
        printer.finish(request.finish_reason == "length")
        if printer.content:
            self.messages = [*asked, dict(role="assistant", content=printer.content)]
        self._totals.add(timing)
        full, limited = f"the context of {self.llm.max_context} tokens is full", f"max_tokens is {params.max_tokens}"
        self._last = Turn(
            content=printer.content,
            had_thoughts=bool(printer.thoughts),
            timing=timing,
            finish_reason=request.finish_reason,
            error=request.error,
            most=full if params.max_tokens == room else limited,
        )
        return self._last

    def _params(self, room: int, seed: int, options: Mapping[str, Any]) -> SamplingParams:
        fields = self.settings | dict(options) | dict(seed=seed)
        return self.llm.default_params(**fields | dict(max_tokens=min(room, self.settings.get("max_tokens", room))))

    def _room(self, ids: Sequence[int], has_answers: bool) -> int:
        """How many tokens the context has left for the answer to a prompt. ValueError if there is none. has_answers:
        whether there are earlier questions and answers in it, which could be dropped."""
        room = self.llm.max_context - len(ids)
        if room < 1:
            what = "the conversation" if has_answers else "the question with its template"
            drop = "/reset it" if has_answers else "shorten it"
            raise ValueError(
                f"{what} has {len(ids)} tokens, which leave no room for an answer in the context of "
                f"{self.llm.max_context}: {drop}{self._or_a_longer_context}"
            )
        return room

    @property
    def _or_a_longer_context(self) -> str:
        """What else helps where the context is full; nothing, where the model has no longer one."""
        has_more = self.llm.max_context < self.llm.model.config.max_positions
        return ", or start with a larger --max-context" if has_more else ""

    @functools.cached_property
    def _chat(self) -> chat.ChatModel:
        llm = self.llm
        return chat.ChatModel(llm.tokenizer, llm.engine.eos_ids, llm.vocab_size, llm.max_context)

    # ------------------------------------------------------------ thoughts

    @property
    def _variables(self) -> dict[str, Any]:
        """The variables of the chat template that /think and /nothink set."""
        switch = self._chat.thinking
        return {} if self.thinking is None or switch is None else {switch.variable: self.thinking}

    def _think(self, _: str) -> None:
        self._set_thinking(True)

    def _nothink(self, _: str) -> None:
        self._set_thinking(False)

    def _set_thinking(self, is_on: bool) -> None:
        if self._chat.thinking is None:
            always = any(map(marks_of, self.llm.tokenizer.chat_templates.values()))
            knows = "knows thoughts, but has no switch for them" if always else "knows no thinking"
            raise ValueError(f"this model's chat template {knows}, so this changes nothing")
        self.thinking = is_on
        tell(f"thinking {'on' if is_on else 'off'}, from the next answer on")

    # ------------------------------------------------------------ the messages

    def _regenerate(self, _: str) -> None:
        if not self._asked:
            raise ValueError("there is no question to answer again yet")
        if self.is_greedy:
            tell("at temperature 0 every seed gives the same answer; /set temperature 0.7 allows others")
        self._tell_about(self._answer(self._asked, self._num_tries + 1))

    def _undo(self, _: str) -> None:
        asked = _up_to_question(self.messages)
        if not asked:
            raise ValueError("there is nothing to undo: the conversation has no question yet")
        self._set_messages(asked[:-1])
        question, left = textwrap.shorten(asked[-1]["content"], 60), counted(len(asked) - 1, "message")
        tell(f"forgotten: {question!r} and its answer; {left} left")

    def _reset(self, _: str) -> None:
        self._set_messages([message for message in self.messages if message["role"] == "system"])
        tell("forgotten")

    def _system(self, text: str) -> None:
        self._set_messages([dict(role="system", content=text)] if text else [])
        tell("system message set, conversation forgotten" if text else "system message removed, conversation forgotten")

    def _set_messages(self, messages: list[Message]) -> None:
        self.messages, self._asked, self._num_tries = messages, _up_to_question(messages), 0

    def _save(self, name: str) -> None:
        with open(_named(name, "/save"), "w", encoding="utf-8") as file:
            json.dump(self.messages, file, ensure_ascii=False, indent=1)
        tell(f"{counted(len(self.messages), 'message')} in {name}")

    def _load(self, name: str) -> None:
        with open(_named(name, "/load"), encoding="utf-8") as file:
            try:
                messages = json.load(file)
            except ValueError as error:  # no JSON, or no UTF-8
                raise ValueError(f"{name}: expected messages as /save writes them, this is not JSON: {error}") from None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(f"{name}: expected a list of messages, each with a role and a content")
        self._set_messages(messages)
        tell(f"{counted(len(messages), 'message')} from {name}")

    # ------------------------------------------------------------ settings and lists

    def _set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            if name not in self.settings:
                raise ValueError(f"/set {name}: no such setting; there are {', '.join(self.settings)}")
            changed = {**self.settings, name: _number(name, value.strip(), type(self.settings[name]))}
            self.llm.default_params(**changed)
            self.settings = changed
            if name in DRAWN and self.is_greedy:
                tell(f"{name} has no effect {AT_ZERO}")
        shown_settings = [f"{name} {value}" for name, value in self.settings.items()]
        if switch := self._chat.thinking:
            is_on = switch.default if self.thinking is None else self.thinking
            shown_settings.append(f"thinking {'on' if is_on else 'off'}")
        write(", ".join(shown_settings) + "\n")

    def _stats(self, _: str) -> None:
        asked, used = _up_to_question(self.messages), 0
        if asked:
            prompt = self._chat.prompt(chat.Conversation(self.messages, variables=self._variables), asks=False)
            used = len(self.llm.tokenizer.encode(prompt, add_special_tokens=False))
        rows = [("messages", f"{len(self.messages)}"), ("context", f"{used} of {self.llm.max_context} tokens")]
        if self._last is not None:
            began = self._last.timing.num_output > 0
            last = str(self._last.timing) if began else "interrupted before its first token"
            rows += [("last answer", last), ("all", str(self._totals))]
        _print_columns(rows)

    def _help(self, _: str) -> None:
        commands = [(f"/{names[0]} {argument}".rstrip(), does) for names, _, argument, does in COMMANDS]
        _print_columns([*commands, *ENTERING])

    def _exit(self, _: str) -> None:
        self.open = False


def _up_to_question(messages: list[Message]) -> list[Message]:
    """The messages up to the last question; none where there is no question."""
    numbers = [number for number, message in enumerate(messages) if message["role"] == "user"]
    return messages[: numbers[-1] + 1] if numbers else []


def _meant(name: str, names: Iterable[str], mark: str = "") -> str:
    """A guess at what a wrong name was meant to be, in words; an empty text without one."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {mark}{near[0]}?)" if near else ""


def _print_columns(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    write("".join(f"{name:<{width}}  {text}\n" for name, text in rows))


def _number(name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"/set {name} {value}: expected a number") from None


def _named(name: str, command: str) -> str:
    if not name:
        raise ValueError(f"{command}: expected a file name")
    return os.path.expanduser(name)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A context in which Ctrl-C does not interrupt a step of the engine: it makes the yielded function return True."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def tell(text: str) -> None:
    """Prints a remark for the user to standard error, in parentheses."""
    print(shown(f"({text})", sys.stderr), file=sys.stderr, flush=True)
