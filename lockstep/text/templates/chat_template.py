"""Chat templates: a conversation as the prompt text its model was trained on.

Templates come with checkpoints, so they are programs of strangers: they run in jinja2's immutable sandbox
(template_sandbox.py), in a process of their own that is ended where one takes too much (template_child.py). Variables
and helpers are those of apply_chat_template in Hugging Face transformers.
"""

import marshal
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.text.job_process import JobProcess
from lockstep.text.job_server import Ended

MAX_TEMPLATE_CHARS = 1 << 20
SECONDS = 2.0
NUM_BYTES = 256 << 20
MAX_IDLE = 2  # copies of the process that are kept, as many as render at once in a server
CUT = "\ufdd0cut here\ufdd0"  # marks a place in what is rendered: noncharacters, which no text has


class TooMuch(ValueError):
    """A template that reached a limit of time or memory."""


class TemplateProcess:
    """The process in which the templates of a model are compiled and rendered, started when the first one is.

    Compiling, and each rendering, may take so many seconds of the processor and so much memory, beside the
    conversation: more is TooMuch. Any thread may use it, and none waits for another one. Busy where the machine gives
    it no time.
    """

    def __init__(self, seconds: float = SECONDS, num_bytes: int = NUM_BYTES) -> None:
        self.seconds, self.num_bytes = seconds, num_bytes
        self.jobs = JobProcess("lockstep.text.templates.child", "templates", max_idle=MAX_IDLE)

    def compile(self, source: str) -> bytes:
        """Compiled code, for `render`. ValueError for a template that is not valid; TooMuch."""
        return bytes(self._ask(source, None, "to compile"))

    def render(self, code: bytes, variables: Mapping[str, object]) -> str:
        """What a template makes of plain values. ValueError if it refuses or fails; TooMuch; Busy."""
        return self._ask(code, dict(variables), "to render").decode("utf-8", "surrogatepass")

    def _ask(self, template, variables, what):
        try:
            return self.jobs.ask(_packed((self.seconds, self.num_bytes, template, variables)))
        except Ended as ended:
            much = f"more than {self.seconds:g} s of the processor" if ended.took_too_long else "too much memory"
            raise TooMuch(f"chat template takes {much} {what}") from None


class ChatTemplate:
    """A compiled template. Raises ValueError if the source is not valid or longer than a million characters.

    process: where it is compiled and rendered; one of its own if none is given.
    """

    def __init__(self, source: str, process: TemplateProcess | None = None) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ValueError(f"chat template of {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are allowed")
        self._process = TemplateProcess() if process is None else process
        self._code = self._process.compile(source)

    def render(
        self,
        messages: Sequence[Mapping],
        tools: Sequence | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt text. `variables` are the template's own, such as bos_token or enable_thinking.

        All of it is made of texts, numbers, truth values, None, lists and mappings. Raises ValueError with the
        template's reason if it refuses the conversation, or if it fails, reaches for what the sandbox forbids, or takes
        too much time or memory; Busy where the machine gives it no time.
        """
        check_messages(messages)
        known = {"messages": messages, "tools": tools, "documents": None}
        return self._process.render(self._code, {**variables, **known, "add_generation_prompt": add_generation_prompt})


def check_messages(messages: Sequence[Mapping]) -> None:
    """Raise ValueError unless `messages` is a list of objects that each have a role."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list, got {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} must be an object with a role, got {message!r:.80}")


def _packed(order: tuple) -> bytes:
    try:
        return marshal.dumps(order)
    except ValueError:  # it knows no subclasses, such as enumerations and ordered dictionaries
        pass
    try:
        return marshal.dumps(_plain(order))
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"chat template: the conversation cannot be given to it: {reason}") from None


def _plain(value: object) -> Any:
    """A value made of the types that marshal knows. ValueError if there is another one in it."""
    if value is None or isinstance(value, (bool, bytes)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (Sequence, set, frozenset)):
        return [_plain(each) for each in value]
    raise ValueError(f"a {type(value).__name__} is neither text, number, truth value, None, list nor mapping")
