"""The formats (styles) in which models write tool calls, and the style that a chat template teaches."""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.text.tool_calls import harmony, hermes, llama, mistral, xml
from lockstep.text.tool_calls.readers import Calls, Reader


@dataclass(frozen=True)
class Style:
    """A format of tool calls.

    begin: the mark before a call. first: a text that begins a call at the start of an answer, without the mark. after:
    marks that end or separate calls. end: the mark after every call, or None. takes_apart: each argument is written on
    its own and strings without quotes, so that a schema is not enforced as a whole. read: makes the coroutine that
    reads the text after `begin` into a Calls (readers.py). rules: adds the style's rules to a Lark (grammar.py).
    """

    name: str
    begin: str
    read: Callable[[Calls], Reader]
    rules: Callable
    after: tuple[str, ...] = ()
    first: str | None = None
    takes_apart: bool = False
    end: str | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that end a call's JSON, except inside of a string."""
        return (self.begin, self.end) if self.end else (self.begin,)


HERMES = Style("hermes", "<tool_call>", hermes.read, hermes.rules, after=("</tool_call>",), end="</tool_call>")
XML = Style(
    "xml",
    "<tool_call>",
    xml.read,
    xml.rules,
    after=("</tool_call>", xml.FUNCTION_END, xml.END),
    takes_apart=True,
    end="</tool_call>",
)
MISTRAL = Style("mistral", "[TOOL_CALLS]", mistral.read, mistral.rules)
MISTRAL_NAMED = Style("mistral_named", "[TOOL_CALLS]", mistral.read, mistral.named_rules)
LLAMA = Style("llama", "<|python_tag|>", llama.read, llama.rules, after=(";",), first="{")
HARMONY = Style("harmony", harmony.BEGIN, harmony.read, harmony.rules, after=(harmony.CALL,), end=harmony.CALL)
STYLES = (HERMES, XML, MISTRAL, MISTRAL_NAMED, LLAMA, HARMONY)


def style_of(template):
    """The Style that a chat template teaches; None if the template does not mention tools."""
    if harmony.CHANNEL in template and harmony.MESSAGE in template:
        return HARMONY
    if "<tool_call>" in template:
        return XML if "<function=" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<|python_tag|>" in template or "ipython" in template:
        return LLAMA
    return HERMES if "tools" in template else None
