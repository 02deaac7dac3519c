"""The formats (styles) in which models write tool calls, and the style that a chat template teaches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.text.tool_calls import gemma, harmony, hermes, json_list, llama, mistral, xml
from lockstep.text.tool_calls.readers import Calls, Reader


@dataclass(frozen=True)
class Style:
    """A format of tool calls.

    begin: the mark before a call. first: a text that begins a call at the start of an answer, without the mark. after:
    marks that end or separate calls. end: the mark after every call, or None. takes_apart: each argument is written on
    its own and strings without quotes, so that a schema is not enforced as a whole. read: makes the coroutine that
    reads the text after `begin` into a Calls (readers.py). rules: adds the style's rules to a Lark (grammar.py). write:
    the text of calls, {"name", "arguments"} each, in a message, for templates that do not show a message's calls.
    """

    name: str
    begin: str
    read: Callable[[Calls], Reader]
    rules: Callable
    after: tuple[str, ...] = ()
    first: str | None = None
    takes_apart: bool = False
    end: str | None = None
    write: Callable[[Sequence[dict]], str] = hermes.write

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that end a call's JSON, except inside of a string."""
        return (self.begin, self.end) if self.end else (self.begin,)


HERMES = Style("hermes", "<tool_call>", hermes.read, hermes.rules, after=("</tool_call>",), end="</tool_call>")


def _xml(name: str, form: xml.Form) -> Style:
    begin, end = form.marks
    after = (end, xml.FUNCTION_END, xml.END)
    return Style(name, begin, xml.reader(form), xml.rules(form), after=after, takes_apart=True, end=end)


XML, SEED = _xml("xml", xml.QWEN), _xml("seed", xml.SEED)
MISTRAL = Style("mistral", "[TOOL_CALLS]", mistral.read, mistral.rules)
MISTRAL_NAMED = Style("mistral_named", "[TOOL_CALLS]", mistral.read, mistral.named_rules)
LLAMA = Style("llama", "<|python_tag|>", llama.read, llama.rules, after=(";",), first="{")
HARMONY = Style("harmony", harmony.BEGIN, harmony.read, harmony.rules, after=(harmony.CALL,), end=harmony.CALL)
GRANITE = Style("granite", json_list.BEGIN, json_list.read, json_list.rules(), write=json_list.writer())
PHI_END = "<|/tool_call|>"
PHI = Style(
    "phi",
    json_list.BEGIN,
    json_list.read,
    json_list.rules(PHI_END),
    after=(PHI_END,),
    end=PHI_END,
    write=json_list.writer(PHI_END),
)


def _gemma(name: str, begin: str, end: str, delimiter: str, result: str) -> Style:
    """A Style of Gemma's. result: the mark before a tool's result, with which a model may go on behind its calls."""
    return Style(
        name,
        begin,
        gemma.reader(delimiter),
        gemma.rules(begin, end, delimiter),
        after=(end, result),
        first=gemma.CALL,
        takes_apart=True,
        end=end,
        write=gemma.writer(begin, end, delimiter),
    )


GEMMA = _gemma("gemma", "<|tool_call>", "<tool_call|>", gemma.DELIMITER, "<|tool_response>")
FUNCTION_GEMMA = _gemma(
    "function_gemma", "<start_function_call>", "<end_function_call>", gemma.ESCAPE, "<start_function_response>"
)
STYLES = (HERMES, XML, SEED, MISTRAL, MISTRAL_NAMED, LLAMA, HARMONY, GRANITE, PHI, GEMMA, FUNCTION_GEMMA)


def style_of(template):
    """The Style that a chat template teaches; None if the template does not mention tools."""
    if harmony.CHANNEL in template and harmony.MESSAGE in template:
        return HARMONY
    if "<tool_call>" in template:
        return XML if "<function=" in template else HERMES
    for style in (SEED, GEMMA, FUNCTION_GEMMA):
        if style.begin in template:
            return style
    if "<|/tool|>" in template or PHI_END in template:
        return PHI
    if json_list.BEGIN in template:
        return GRANITE
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<|python_tag|>" in template or "ipython" in template:
        return LLAMA
    return HERMES if "tools" in template else None
