"""The body of /v1/chat/completions, and the Conversation made from it."""

from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lockstep.serve.errors import bad_request, wrong_field
from lockstep.serve.fields.body import Fields, Items, SimpleOr, TypedFields, Whole, bounded_loads, or_default, shown
from lockstep.serve.fields.continuation import ContinueFields
from lockstep.serve.fields.response_format import ResponseFormatFields, format_field, grammar_of
from lockstep.serve.fields.sampling import MostTokens, SamplingFields
from lockstep.serve.fields.stream import StreamFields
from lockstep.text.conversation import Conversation
from lockstep.text.reasoning import template_variables
from lockstep.text.tool_calls.json_text import json_value
from lockstep.text.tool_calls.tools import NO_PARAMETERS, Tool, ToolUse

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")  # types of a message's parts that hold text


class Part(Fields):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Fields):
    """The function of a tool call; arguments: JSON text, or the object itself."""

    name: str
    arguments: SimpleOr[str, dict] | None = None


class Call(Fields):
    """A tool call of an earlier assistant message."""

    id: str | None = None
    function: CalledFunction


class Message(Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: SimpleOr[str, Items[Part]] | None = None
    name: str | None = None
    tool_calls: Items[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionFields(Fields):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict | None = None
    strict: bool | None = None


class ToolFields(TypedFields):
    """A tool; only functions are used."""

    known_types: ClassVar = ("function",)

    type: Annotated[str, or_default("function")] = "function"
    function: FunctionFields | None = None


class NamedFunction(Fields):
    """The name of a function."""

    name: str


class AllowedTools(Fields):
    """The tools that may be called."""

    mode: Literal["auto", "required"]
    tools: Items[ToolFields]


class ToolChoice(Fields):
    """The function that must be called, or the tools that may be called."""

    type: Annotated[Literal["function", "allowed_tools"], or_default("function")] = "function"
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class ChatFields(SamplingFields, ContinueFields, ResponseFormatFields, StreamFields):
    """The body of a request."""

    model: str | None = None
    messages: Items[Message]
    max_tokens: MostTokens | None = None
    max_completion_tokens: MostTokens | None = None
    n_predict: MostTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    tools: Items[ToolFields] | None = None
    tool_choice: SimpleOr[Literal["none", "auto", "required"], ToolChoice] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_ids: bool | None = None


def conversation(fields):
    """The Conversation of ChatFields. ValueError or ApiError 400 for fields that cannot be used."""
    messages = [message(i, each) for i, each in enumerate(fields.messages)]
    continues = bool(fields.continue_final_message)
    if not messages:
        raise wrong_field("messages", "expected at least one message, got none")
    if continues and messages[-1]["role"] != "assistant":
        raise wrong_field("continue_final_message", "expected the last message to be the assistant's")
    variables = template_variables(fields.chat_template_kwargs, fields.reasoning_effort)
    return Conversation(messages, tool_use(fields), grammar_of(fields), variables, continues, format_field(fields))


# ---------------------------------------------------------------- messages


def message(index, given):
    """A Message in the form that chat templates expect."""
    where = f"messages[{index}]"
    content = text_of(given.content, f"{where}.content")
    if content is None and given.role != "assistant":
        raise wrong_field(f"{where}.content", f"expected a text for role {given.role}, got null")
    made: dict[str, Any] = dict(role="tool" if given.role == "function" else given.role, content=content or "")
    if given.tool_calls:
        made["tool_calls"] = [
            tool_call(call.id, call.function.name, call.function.arguments) for call in given.tool_calls
        ]
    thought = given.reasoning_content if given.reasoning_content is not None else given.reasoning
    optional = dict(name=given.name, tool_call_id=given.tool_call_id, reasoning_content=thought)
    return made | {name: value for name, value in optional.items() if value is not None}


def text_of(content: str | list[Part] | None, where: str, types: tuple[str, ...] = TEXT_PARTS) -> str | None:
    """The text of content: a string, parts of the given types, or null, which stays None. where: its path in the body.

    ApiError 400 for a part of another type.
    """
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        if part.type not in types:
            problem = f"this model reads only text, got a part of type {shown(part.type)}"
            raise bad_request(f"{where}[{i}]: {problem}", f"{where}[{i}].type", "unsupported")
    return "\n".join(part.text or part.refusal or "" for part in content)


def tool_call(call_id, name, arguments):
    """A tool call of an earlier answer in the form that chat templates expect: with its arguments as an object."""
    value = arguments if isinstance(arguments, dict) else arguments_of(arguments or "{}")
    return dict(id=call_id, type="function", function=dict(name=name, arguments=value))


def arguments_of(text):
    """The arguments of a tool call as an object; {"incomplete_json": text} where the text is cut off or not JSON. What
    JSON can write but a prompt cannot (halves of characters, numbers beyond float64) is replaced."""
    try:
        bounded_loads(text, "the text of a call's arguments")
        value = json_value(text, None)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else dict(incomplete_json=text)


# ---------------------------------------------------------------- tools


def tool_use(fields):
    """The ToolUse of ChatFields' tools and tool_choice."""
    functions = [tool.function for tool in fields.tools or () if tool.type == "function"]
    if None in functions:
        where = f"tools[{[tool.type == 'function' and tool.function is None for tool in fields.tools].index(True)}]"
        raise wrong_field(f"{where}.function", "this field is required for a tool of type function", "missing_field")
    tools = [
        Tool(function.name, function.description or "", function.parameters or NO_PARAMETERS, bool(function.strict))
        for function in functions
    ]
    choice, parallel = fields.tool_choice or "auto", fields.parallel_tool_calls is not False
    if isinstance(choice, str):
        return tool_use_of(tools, choice, None, parallel)
    chosen = getattr(choice, choice.type)
    if chosen is None:
        raise bad_request(f"tool_choice.{choice.type}: this field is required", "tool_choice", "missing_field")
    if choice.type == "function":
        return tool_use_of(tools, "required", [chosen.name], False)
    return tool_use_of(tools, chosen.mode, [tool.function.name for tool in chosen.tools if tool.function], parallel)


def tools_of(given: Sequence[Any], types: Collection[str | None], schema_field: str = "parameters") -> list[Tool]:
    """The Tools whose type is among `types`. schema_field: the name of the field with a tool's JSON schema.

    ApiError 400 for a tool without a name.
    """
    tools = []
    for i, tool in enumerate(given):
        if tool.type in types:
            if tool.name is None:
                problem = "this field is required for a tool that the model calls"
                raise wrong_field(f"tools[{i}].name", problem, "missing_field")
            schema = getattr(tool, schema_field) or NO_PARAMETERS
            tools.append(Tool(tool.name, tool.description or "", schema, bool(tool.strict)))
    return tools


def tool_use_of(tools, mode, allowed=None, parallel: bool = True):
    """A ToolUse. mode: "none", "auto" or "required"; allowed: names of the tools that may be called, None for all."""
    if mode == "none":
        return ToolUse()
    return ToolUse(tuple(tools), mode == "required", None if allowed is None else tuple(allowed), parallel)
