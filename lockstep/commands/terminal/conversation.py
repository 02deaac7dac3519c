"""A conversation with a model: its messages, its settings, and the /commands that change them."""

import json
import signal
import sys
from contextlib import contextmanager

from lockstep.commands.terminal.answer import answer
from lockstep.commands.terminal.errors import is_told, sentence
from lockstep.commands.terminal.output import counted, shown, write

HELP = """\
/reset            forget the conversation
/system [TEXT]    set the system message, or remove it; forgets the conversation
/set [NAME VALUE] change a setting, or show all
/save FILE        write the conversation as JSON
/load FILE        continue a saved one
/exit             end"""
ROLES = ("system", "user", "assistant")


class Conversation:
    """The messages so far. `hear` takes a line that the user typed: a /command or a message."""

    def __init__(self, llm, settings, system=None) -> None:
        self.llm, self.settings, self.open = llm, dict(settings), True
        llm.default_params(**settings)  # ValueError for settings that are not allowed
        self.messages = [dict(role="system", content=system)] if system else []

    def hear(self, line) -> None:
        """Acts on a line. A user's mistake, or a lack of memory, is printed as a sentence and changes nothing."""
        try:
            if line.startswith("/"):
                self._command(*line[1:].split(None, 1))
            elif line.strip():
                self._reply(line)
        except Exception as error:
            if not is_told(error):
                raise
            tell(sentence(error))

    def _command(self, name: str = "", argument: str = "") -> None:
        commands = dict(
            help=self._help,
            reset=self._reset,
            system=self._system,
            set=self._set,
            save=self._save,
            load=self._load,
            exit=self._exit,
            quit=self._exit,
        )
        if name not in commands:
            raise ValueError(f"/{name}: no such command; /help lists them")
        commands[name](argument.strip())

    # ------------------------------------------------------------ answers

    def _reply(self, line) -> None:
        """Streams the answer to a message; both become part of the conversation unless the answer is empty."""
        messages = [*self.messages, dict(role="user", content=line)]
        ids = self.llm.chat_prompt(messages)
        params = self.llm.default_params(**{**self.settings, "max_tokens": self._room(ids)})
        with interruptible() as interrupted:
            stream, timing = answer(self.llm, ids, params, write, interrupted)
        write("\n")
        tell("interrupted" if interrupted() else stream.request.error or str(timing))
        if stream.text:
            self.messages = [*messages, dict(role="assistant", content=stream.text)]

    def _room(self, ids):
        room = self.llm.max_context - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens and the context {self.llm.max_context}: "
                f"/reset it, or start with a larger --max-context if the model has more"
            )
        return min(room, self.settings["max_tokens"])

    # ------------------------------------------------------------ commands

    def _help(self, _) -> None:
        print(HELP)

    def _exit(self, _) -> None:
        self.open = False

    def _reset(self, _) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]
        tell("forgotten")

    def _system(self, text) -> None:
        self.messages = [dict(role="system", content=text)] if text else []
        tell("system message set, conversation forgotten" if text else "system message removed, conversation forgotten")

    def _set(self, argument) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            if name not in self.settings:
                raise ValueError(f"/set {name}: no such setting; there are {', '.join(self.settings)}")
            changed = {**self.settings, name: _number(name, value.strip(), type(self.settings[name]))}
            self.llm.default_params(**changed)
            self.settings = changed
        print(", ".join(f"{name} {value}" for name, value in self.settings.items()))

    def _save(self, name) -> None:
        with open(_named(name, "/save"), "w", encoding="utf-8") as file:
            json.dump(self.messages, file, ensure_ascii=False, indent=1)
        tell(f"{counted(len(self.messages), 'message')} in {name}")

    def _load(self, name) -> None:
        with open(_named(name, "/load"), encoding="utf-8") as file:
            messages = json.load(file)
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(f"{name}: expected a list of messages, each with a role and a content")
        self.messages = messages
        tell(f"{counted(len(messages), 'message')} from {name}")


def _number(name, value, kind):
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"/set {name} {value}: expected a number") from None


def _named(name, command):
    if not name:
        raise ValueError(f"{command}: expected a file name")
    return name


def _is_message(value) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


@contextmanager
def interruptible():
    """A context in which Ctrl-C does not interrupt a step of the engine: it makes the yielded function return True."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def tell(text) -> None:
    """Prints a remark for the user to standard error, in parentheses."""
    print(shown(f"({text})", sys.stderr), file=sys.stderr, flush=True)
