"""The body of /v1/responses, and the Conversation made from it. Nothing is stored between requests."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lockstep.serve.errors import check_most, wrong_field
from lockstep.serve.fields.body import Fields, Items, SimpleOr, TypedFields, Whole, shown
from lockstep.serve.fields.chat import TEXT_PARTS, Part, text_of, tool_call, tool_use_of, tools_of
from lockstep.serve.fields.sampling import MostTokens, SamplingFields, check_single
from lockstep.serve.fields.stream import NamedEventStreamFields
from lockstep.text.conversation import Conversation
from lockstep.text.grammars import structured
from lockstep.text.reasoning import template_variables

ITEM_PARTS = (*TEXT_PARTS, "summary_text", "reasoning_text")  # types of an item's parts that hold text


class Item(TypedFields):
    """An item of the input. Its type, which a message may leave out, says which of the fields it has."""

    known_types: ClassVar = ("message", "reasoning", "function_call", "function_call_output", "item_reference")

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: SimpleOr[str, Items[Part]] | None = None
    summary: Items[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: SimpleOr[str, Items[Part]] | None = None


class ToolFields(TypedFields):
    """A tool. Only functions are used; the model does not see tools of other types."""

    known_types: ClassVar = ("function",)

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict | None = None
    strict: bool | None = None


class ToolChoice(Fields):
    """The function that must be called, or the tools that may be called."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Items[dict[str, Any]] | None = None


class TextFormat(Fields):
    """The required format of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFields(Fields):
    """Settings of the answer's text."""

    format: TextFormat | None = None


class ReasoningFields(Fields):
    """How much the model thinks before it answers."""

    effort: str | None = None


class ResponsesFields(SamplingFields, NamedEventStreamFields):
    """The body of a request."""

    model: str | None = None
    input: SimpleOr[str, Items[Item]]
    instructions: str | None = None
    include: Items[str] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    max_output_tokens: MostTokens | None = None
    tools: Items[ToolFields] | None = None
    tool_choice: SimpleOr[Literal["none", "auto", "required"], ToolChoice] | None = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict | None = None

    @property
    def format_fields(self) -> list[str]:
        """The name of the field that sets the format of the text, if the body has one."""
        return ["text.format"] if self.text is not None and self.text.format is not None else []


def num_logprobs(fields, limits):
    """The number of alternatives to report for each token of the text; None for no log-probabilities."""
    check_most("top_logprobs", fields.top_logprobs or 0, limits.max_logprobs)
    wanted = fields.top_logprobs or "message.output_text.logprobs" in (fields.include or ())
    return (fields.top_logprobs or 0) if wanted else None


def conversation(fields):
    """The Conversation of ResponsesFields. ValueError or ApiError 400 for fields that cannot be used."""
    refuse_state(fields)
    effort = fields.reasoning.effort if fields.reasoning else None
    return Conversation(
        input_messages(fields),
        tool_use(fields),
        grammar_of(fields),
        template_variables(fields.chat_template_kwargs, effort),
        form="text",
    )


def refuse_state(fields) -> None:
    """ApiError 400 for fields that need a server which stores responses."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(fields, name) is not None:
            raise wrong_field(name, "this server keeps nothing between requests, send the whole input", "unsupported")
    if fields.background:
        raise wrong_field("background", "this server answers while the client waits, expected false", "unsupported")
    check_single(fields)


# ---------------------------------------------------------------- input


def input_messages(fields):
    """The messages of instructions and input in the form that chat templates expect. Items of unknown types are left
    out."""
    items = [Item(role="user", content=fields.input)] if isinstance(fields.input, str) else fields.input
    messages = [dict(role="system", content=fields.instructions)] if fields.instructions else []
    for i, item in enumerate(items):
        _add_item(messages, f"input[{i}]", item)
    if not any(message["role"] != "system" for message in messages):
        raise wrong_field("input", "expected at least one message, got none")
    return messages


def _add_item(messages, where, item) -> None:
    """Adds an item to the messages. where: its path in the body."""
    item_type = item.type or "message"
    if item_type == "message":
        _add_message(messages, where, item)
    elif item_type == "reasoning":
        field = "content" if item.content else "summary"
        thought = text_of(getattr(item, field) or "", f"{where}.{field}", ITEM_PARTS)
        _assistant_message(messages)["reasoning_content"] = thought
    elif item_type == "function_call":
        call = tool_call(item.call_id, item.name or "", item.arguments)
        _assistant_message(messages).setdefault("tool_calls", []).append(call)
    elif item_type == "function_call_output":
        content = text_of(item.output or "", f"{where}.output", ITEM_PARTS)
        messages.append(dict(role="tool", tool_call_id=item.call_id, content=content))
    elif item_type == "item_reference":
        raise wrong_field(where, "this server keeps no items, send them whole", "unsupported")


def _add_message(messages, where, item) -> None:
    if item.role is None:
        raise wrong_field(f"{where}.role", "this field is required", "missing_field")
    content = text_of(item.content or "", f"{where}.content", ITEM_PARTS)
    if item.role != "assistant":
        messages.append(dict(role=item.role, content=content))
        return
    message = _assistant_message(messages)
    message["content"] = "\n".join(text for text in (message["content"], content) if text)


def _assistant_message(messages):
    """The last message if it is the assistant's, else a new one: successive items of an answer are one message."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append(dict(role="assistant", content=""))
    return messages[-1]


# ---------------------------------------------------------------- tools and the format of the text


def tool_use(fields):
    """The ToolUse of ResponsesFields' tools and tool_choice."""
    tools = tools_of(fields.tools or (), ["function"])
    choice, parallel = fields.tool_choice or "auto", fields.parallel_tool_calls is not False
    if isinstance(choice, str):
        return tool_use_of(tools, choice, None, parallel)
    if choice.type == "function":
        return tool_use_of(tools, "required", [choice.name], False)
    if choice.type == "allowed_tools":
        names = [tool.get("name") for tool in choice.tools or () if tool.get("type") == "function"]
        return tool_use_of(tools, choice.mode or "auto", names, parallel)
    raise wrong_field(
        "tool_choice",
        f"expected none, auto, required, a function or allowed_tools, got {shown(choice.type)}",
        "unsupported",
    )


def grammar_of(fields):
    """The grammar of text.format; None for free text."""
    text_format = fields.text.format if fields.text else None
    if text_format is None or text_format.type == "text":
        return None
    if text_format.type == "json_object":
        return structured.json_object()
    if text_format.schema_ is None:
        raise wrong_field("text.format.schema", "this field is required", "missing_field")
    with structured.errors_about("text"):
        return structured.json_schema(text_format.schema_, bool(text_format.strict))
