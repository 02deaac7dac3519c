"""The body of /v1/chat/completions, and the Conversation that it asks for."""
import json
from typing import Annotated, Literal

from pydantic import Field

from lockstep.serve import structured
from lockstep.serve.chat import Conversation
from lockstep.serve.http.body import Fields, shown, simple_or
from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.sampling import Count, SamplingFields
from lockstep.serve.reasoning import template_variables
from lockstep.serve.tool_calls.tools import Tool, ToolUse

NO_PARAMETERS = {"type": "object", "properties": {}}


class Part(Fields):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Fields):
    """What was called, with arguments as JSON text."""

    name: str
    arguments: simple_or(str, dict) | None = None


class Call(Fields):
    """A tool call of an earlier answer."""

    id: str | None = None
    function: CalledFunction


class Message(Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: simple_or(str, list[Part]) | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionFields(Fields):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict | None = None
    strict: bool | None = None


class ToolFields(Fields):
    """A tool; only functions are used."""

    type: str = "function"
    function: FunctionFields | None = None


class NamedFunction(Fields):
    """The name of a function."""

    name: str


class NamedTool(Fields):
    """A tool that has to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class SchemaFields(Fields):
    """A JSON schema with OpenAI's wrapping."""

    name: str | None = None
    schema_: dict | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """What the answer's text has to be."""

    type: str
    json_schema: SchemaFields | None = None
    schema_: dict | None = Field(None, alias="schema")
    pattern: str | None = None
    grammar: str | None = None


class StructuredOutputs(Fields):
    """vLLM's extension: one of these."""

    json_: simple_or(str, dict) | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(Fields):
    """What a stream has besides the answer."""

    include_usage: bool | None = None


class ChatFields(SamplingFields):
    """The body of a request."""

    model: str | None = None
    messages: list[Message]
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[ToolFields] | None = None
    tool_choice: simple_or(Literal["none", "auto", "required"], NamedTool) | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: simple_or(str, dict) | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict | None = None
    continue_final_message: bool | None = None
    return_token_ids: bool | None = None


def conversation(fields):
    """The Conversation of ChatFields. ValueError or ApiError 400 for what cannot be."""
    messages = [message(i, each) for i, each in enumerate(fields.messages)]
    continues = bool(fields.continue_final_message)
    if not messages:
        raise bad_request("messages: expected at least one message, got none", "messages", "invalid_value")
    if continues and messages[-1]["role"] != "assistant":
        raise bad_request("continue_final_message: expected the last message to be the assistant's",
                          "continue_final_message")
    variables = template_variables(fields.chat_template_kwargs, fields.reasoning_effort)
    return Conversation(messages, tool_use(fields), grammar_of(fields), variables, continues)


# ---------------------------------------------------------------- messages

def message(index, given):
    """A message as chat templates know one."""
    where = f"messages[{index}]"
    content = text_of(given.content, where)
    if content is None and given.role != "assistant":
        raise bad_request(f"{where}.content: expected a text for role {given.role}, got null", f"{where}.content",
                          "invalid_value")
    made = dict(role="tool" if given.role == "function" else given.role, content=content or "")
    if given.tool_calls:
        made["tool_calls"] = [called(c.id, c.function.name, c.function.arguments, where) for c in given.tool_calls]
    thought = given.reasoning_content if given.reasoning_content is not None else given.reasoning
    more = dict(name=given.name, tool_call_id=given.tool_call_id, reasoning_content=thought)
    return made | {name: value for name, value in more.items() if value is not None}


def text_of(content, where):
    """The text of content that is a text, parts or null, which stays None."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            raise bad_request(f"{where}.content[{i}]: this model reads only text, got a part of type "
                              f"{shown(part.type)}", f"{where}.content[{i}].type", "unsupported")
    return "\n".join(part.text or part.refusal or "" for part in content)


def called(call_id, name, arguments, where):
    """A call of an earlier answer as chat templates know one: with its arguments as an object."""
    try:
        value = json.loads(arguments or "{}") if not isinstance(arguments, dict) else arguments
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad_request(f"{where}.tool_calls: arguments of {name[:80]}: expected JSON text of an object, got "
                          f"{shown(arguments)}", f"{where}.tool_calls", "invalid_value")
    return dict(id=call_id, type="function", function=dict(name=name, arguments=value))


# ---------------------------------------------------------------- tools

def tool_use(fields):
    """The ToolUse of the tools and tool_choice of ChatFields."""
    functions = [tool.function for tool in fields.tools or () if tool.type == "function" and tool.function is not None]
    tools = [Tool(f.name, f.description or "", f.parameters or NO_PARAMETERS, bool(f.strict)) for f in functions]
    named = isinstance(fields.tool_choice, NamedTool)
    return choose(tools, "required" if named else fields.tool_choice or "auto",
                  [fields.tool_choice.function.name] if named else None,
                  fields.parallel_tool_calls is not False and not named)


def choose(tools, mode, allowed=None, parallel=True):
    """A ToolUse. mode: "none", "auto" or "required"; allowed: names, where not all tools are."""
    if mode == "none":
        return ToolUse()
    return ToolUse(tuple(tools), mode == "required", None if allowed is None else tuple(allowed), parallel)


# ---------------------------------------------------------------- the form of the text

def grammar_of(fields):
    """The grammar that response_format or one of vLLM's extensions asks for; None where the text is free."""
    options, extension = fields.response_format, fields.structured_outputs or StructuredOutputs()
    given = {
        "response_format": _format_grammar(options) if options else None,
        "guided_json": _maybe(json_schema, fields.guided_json, extension.json_),
        "guided_regex": _maybe(structured.regex, fields.guided_regex, extension.regex),
        "guided_choice": _maybe(structured.choice, fields.guided_choice, extension.choice),
        "guided_grammar": _maybe(structured.lark, fields.guided_grammar, extension.grammar),
        "json_object": structured.json_object() if extension.json_object else None,
    }
    found = {name: grammar for name, grammar in given.items() if grammar is not None}
    if len(found) > 1:
        raise bad_request(f"expected at most one form of the answer, got {' and '.join(found)}", next(iter(found)))
    return next(iter(found.values()), None)


def _maybe(make, first, second):
    value = first if first is not None else second
    return None if value is None else make(value)


def json_schema(schema, strict=True):
    """The grammar of a schema, which may be JSON text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise ValueError("JSON schema: expected an object or its JSON text") from None
    return structured.json_schema(schema, strict)


def _format_grammar(options):
    kind, wrapped = options.type, options.json_schema
    schema = options.schema_ if wrapped is None else wrapped.schema_
    if kind == "text":
        return None
    if kind in ("json_object", "json_schema") and schema is not None:
        return structured.json_schema(schema, bool(wrapped and wrapped.strict))
    if kind == "json_object":
        return structured.json_object()
    if kind == "regex" and options.pattern is not None:
        return structured.regex(options.pattern)
    if kind == "grammar" and options.grammar is not None:
        return structured.lark(options.grammar)
    expected = "text, json_object, json_schema with its schema, regex with a pattern, or grammar with a grammar"
    raise bad_request(f"response_format: expected {expected}, got {shown(kind)}", "response_format", "invalid_value")
