"""Chat templates: a conversation as the prompt text its model was trained on.

Templates come with checkpoints, so they are untrusted programs: they run in jinja2's immutable sandbox (sandbox.py), in
a worker process (child.py) that is killed where one takes too much time or memory. Variables and helper functions are
those of apply_chat_template in Hugging Face transformers.
"""

import marshal
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.text.job_process import JobProcess
from lockstep.text.job_server import Ended

MAX_TEMPLATE_CHARS = 1 << 20
SECONDS = 2.0  # of processor time, for compiling or for one rendering
NUM_BYTES = 256 << 20  # of memory
MAX_IDLE = 2  # forked workers that are kept, as many as a server renders with at once
CUT = "\ufdd0cut here\ufdd0"  # marks a place in a rendered prompt: Unicode noncharacters, which no text has


class TooMuch(ValueError):
    """A chat template reached its limit of processor time or memory."""


class TemplateProcess:
    """The worker process in which a model's templates are compiled and rendered. It starts with the first of them.

    seconds, num_bytes: the processor time, and the memory beside the conversation, that compiling or one rendering may
    take: more raises TooMuch. A worker that gets no processor time raises Busy. Any thread may use this object, and
    threads do not wait for each other.
    """

    def __init__(self, seconds: float = SECONDS, num_bytes: int = NUM_BYTES) -> None:
        self.seconds, self.num_bytes = seconds, num_bytes
        self.jobs = JobProcess("lockstep.text.templates.child", "templates", max_idle=MAX_IDLE)

    def compile(self, source: str) -> bytes:
        """A template's compiled code, for `render`. ValueError if the template is not valid; TooMuch; Busy."""
        return bytes(self._ask(source, None, "to compile"))

    def render(self, code: bytes, variables: Mapping[str, object]) -> str:
        """The text that a compiled template renders. ValueError if the template refuses or fails; TooMuch; Busy."""
        return self._ask(code, dict(variables), "to render").decode("utf-8", "surrogatepass")

    def _ask(self, template, variables, purpose):
        try:
            return self.jobs.ask(_packed((self.seconds, self.num_bytes, template, variables)))
        except Ended as ended:
            much = f"more than {self.seconds:g} s of the processor" if ended.took_too_long else "too much memory"
            raise TooMuch(f"chat template takes {much} {purpose}") from None


class ChatTemplate:
    """A compiled template. Raises ValueError if the source is not valid or longer than MAX_TEMPLATE_CHARS.

    process: the worker process that compiles and renders it; None: a new one.
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

        All arguments consist of strings, numbers, bools, None, lists and mappings. Raises ValueError with the
        template's own reason if the template refuses the conversation, and also if it fails, uses an attribute that the
        sandbox forbids, or takes too much time or memory; Busy if the worker process gets no processor time.
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
    except ValueError:  # marshal takes no subclasses of plain types, such as enumerations and ordered dictionaries
        pass
    try:
        return marshal.dumps(_plain(order))
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"chat template: the conversation cannot be given to it: {reason}") from None


def _plain(value: object) -> Any:
    """The value with subclasses turned into plain types, which marshal takes. ValueError for any other type in it."""
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
