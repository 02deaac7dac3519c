"""The body of Anthropic's /v1/messages, and the Conversation made from it."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from lockstep.serve.errors import bad_request, wrong_field
from lockstep.serve.fields.body import Fields, Items, SimpleOr, TypedFields, Whole, shown
from lockstep.serve.fields.chat import tool_call, tool_use_of, tools_of
from lockstep.serve.fields.known import GENERATION, PROMPT, KnownFields
from lockstep.serve.fields.sampling import MostTokens, SamplingFields
from lockstep.serve.fields.stream import NamedEventStreamFields
from lockstep.text.conversation import Conversation
from lockstep.text.grammars import structured
from lockstep.text.reasoning import template_variables

IGNORED_BLOCKS = ("redacted_thinking", "server_tool_use", "web_search_tool_result")


class ContentBlock(Fields):
    """A block of content. Its type says which of the fields it has."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict | None = None
    tool_use_id: str | None = None
    content: Any = None
    source: Any = None


class Turn(Fields):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: SimpleOr[str, Items[ContentBlock]]


class ToolFields(TypedFields):
    """A tool. Tools with one of Anthropic's own types run on Anthropic's servers; the model does not see them."""

    known_types: ClassVar = ("custom",)

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict | None = None
    strict: bool | None = None


class ToolChoice(Fields):
    """Whether the model may, must or must not call tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Fields):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Whole | None = None


class OutputFormat(Fields):
    """The required format of the answer's text: JSON that fits a schema."""

    type: Literal["json_schema"]
    schema_: dict = Field(alias="schema")


class OutputConfig(Fields):
    """Where newer clients put the output format, and the effort of thinking."""

    format: OutputFormat | None = None
    effort: str | None = None


class CountFields(KnownFields):
    """The body of a request to count tokens."""

    refused: ClassVar = PROMPT

    model: str | None = None
    messages: Items[Turn]
    system: SimpleOr[str, Items[ContentBlock]] | None = None
    tools: Items[ToolFields] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_format: OutputFormat | None = None
    output_config: OutputConfig | None = None


class MessagesFields(CountFields, SamplingFields, NamedEventStreamFields):
    """The body of a request for an answer."""

    refused: ClassVar = GENERATION

    max_tokens: MostTokens | None
    stop_sequences: Items[str] | None = None

    @property
    def format_fields(self) -> list[str]:
        """The name of the field that sets the format of the text, if the body has one."""
        if self.output_format is not None:
            return ["output_format"]
        return ["output_config.format"] if self.output_config is not None and self.output_config.format else []


def conversation(fields):
    """The Conversation of CountFields. ValueError or ApiError 400 for fields that cannot be used."""
    if not fields.messages:
        raise wrong_field("messages", "expected at least one message, got none")
    messages = [message for i, turn in enumerate(fields.messages) for message in turn_messages(f"messages[{i}]", turn)]
    if fields.system:
        messages.insert(0, dict(role="system", content=text_of(fields.system, "system")))
    output = fields.output_config or OutputConfig()
    output_format = fields.output_format or output.format
    form = "output_format" if fields.output_format else "output_config"
    with structured.errors_about(form):
        grammar = structured.json_schema(output_format.schema_, strict=False) if output_format else None
    thinking = dict(enable_thinking=fields.thinking.type != "disabled") if fields.thinking else None
    return Conversation(
        messages,
        tool_use(fields),
        grammar,
        template_variables(thinking, output.effort),
        continues=fields.messages[-1].role == "assistant",
        form=form,
    )


def tool_use(fields):
    """The ToolUse of CountFields' tools and tool_choice."""
    tools = tools_of(fields.tools or (), [None, "custom"], "input_schema")
    choice = fields.tool_choice or ToolChoice(type="auto")
    if choice.type == "tool" and not choice.name:
        raise wrong_field("tool_choice", "expected the name of a tool, got none")
    mode = dict(auto="auto", none="none", any="required", tool="required")[choice.type]
    return tool_use_of(
        tools,
        mode,
        [choice.name] if choice.type == "tool" else None,
        not choice.disable_parallel_tool_use and choice.type != "tool",
    )


# ---------------------------------------------------------------- messages


def turn_messages(where, turn):
    """The messages of one Turn in the form that chat templates expect: each tool result is a message of its own."""
    if isinstance(turn.content, str):
        return [dict(role=turn.role, content=turn.content)]
    return _assistant(where, turn.content) if turn.role == "assistant" else _user(where, turn.role, turn.content)


def _user(where, role, blocks):
    results = [
        dict(role="tool", tool_call_id=block.tool_use_id, content=_result(f"{where}.content[{i}]", block))
        for i, block in enumerate(blocks)
        if block.type == "tool_result"
    ]
    others = [block for block in blocks if block.type != "tool_result"]
    return results + ([dict(role=role, content=text_of(others, f"{where}.content"))] if others or not results else [])


def _result(where, block):
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    if not isinstance(block.content, list) or not all(isinstance(part, dict) for part in block.content):
        raise bad_request(f"{where}.content: expected a text or blocks, got {shown(block.content)}", where)
    return text_of([_loose(part) for part in block.content], where)


def _loose(part):
    """A block inside of a tool result, of which only the type and the text are used."""
    texts = {name: value for name in ("type", "text") if isinstance(value := part.get(name), str)}
    return ContentBlock.model_validate({"type": "missing", **texts, "source": part.get("source")})


def _assistant(where, blocks):
    calls = [tool_call(block.id, block.name or "", block.input or {}) for block in blocks if block.type == "tool_use"]
    thought = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    texts = [block for block in blocks if block.type not in ("tool_use", "thinking")]
    made = dict(role="assistant", content=text_of(texts, f"{where}.content"))
    return [made | (dict(tool_calls=calls) if calls else {}) | (dict(reasoning_content=thought) if thought else {})]


def text_of(content, where):
    """The text of content: a string, or blocks of text. where: its path in the body. ApiError 400 for other blocks."""
    if isinstance(content, str):
        return content
    texts = []
    for i, block in enumerate(content):
        source = block.source if block.type == "document" and isinstance(block.source, dict) else {}
        if block.type == "text" or (source.get("type") == "text" and isinstance(source.get("data"), str)):
            texts.append(source.get("data") or block.text or "")
        elif block.type not in IGNORED_BLOCKS:
            raise bad_request(
                f"{where}[{i}]: this model reads only text, got a block of type {shown(block.type)}", where
            )
    return "\n".join(texts)
