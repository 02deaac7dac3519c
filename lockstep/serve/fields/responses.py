"""The body of /v1/responses, and the Conversation that it asks for. Nothing is stored between requests."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lockstep.serve.errors import check_most, wrong_field
from lockstep.serve.fields.body import Fields, Items, Kinds, SimpleOr, Whole, shown
from lockstep.serve.fields.chat import TEXTS, Part, called, choose, text_of, tools_of
from lockstep.serve.fields.sampling import MostTokens, SamplingFields, check_single
from lockstep.serve.fields.stream import OwnStreamFields
from lockstep.text.conversation import Conversation
from lockstep.text.grammars import structured
from lockstep.text.reasoning import template_variables

KINDS = (*TEXTS, "summary_text", "reasoning_text")  # types of parts that an item may have


class Item(Kinds):
    """An item of the input; which fields it has depends on its type, which a message may leave out."""

    read: ClassVar = ("message", "reasoning", "function_call", "function_call_output", "item_reference")

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: SimpleOr[str, Items[Part]] | None = None
    summary: Items[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: SimpleOr[str, Items[Part]] | None = None


class ToolFields(Kinds):
    """A tool; only functions are used, others are not offered to the model."""

    read: ClassVar = ("function",)

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict | None = None
    strict: bool | None = None


class Choice(Fields):
    """What the model is to do with the tools."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Items[dict[str, Any]] | None = None


class TextFormat(Fields):
    """What the answer's text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFields(Fields):
    """Settings of the answer's text."""

    format: TextFormat | None = None


class ReasoningFields(Fields):
    """How much the model is to think."""

    effort: str | None = None


class ResponsesFields(SamplingFields, OwnStreamFields):
    """The body of a request."""

    model: str | None = None
    input: SimpleOr[str, Items[Item]]
    instructions: str | None = None
    include: Items[str] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    max_output_tokens: MostTokens | None = None
    tools: Items[ToolFields] | None = None
    tool_choice: SimpleOr[Literal["none", "auto", "required"], Choice] | None = None
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
    def form_names(self) -> list[str]:
        """The field that says what form the text has, if there is one."""
        return ["text.format"] if self.text is not None and self.text.format is not None else []


def num_logprobs(fields, limits):
    """How many alternatives to report for each token of the text; None for no log-probabilities."""
    check_most("top_logprobs", fields.top_logprobs or 0, limits.max_logprobs)
    wanted = fields.top_logprobs or "message.output_text.logprobs" in (fields.include or ())
    return (fields.top_logprobs or 0) if wanted else None


def conversation(fields):
    """The Conversation of ResponsesFields. ValueError or ApiError 400 for what cannot be."""
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
    """ApiError 400 for what would need a server that remembers."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(fields, name) is not None:
            raise wrong_field(name, "this server keeps nothing between requests, send the whole input", "unsupported")
    if fields.background:
        raise wrong_field("background", "this server answers while the client waits, expected false", "unsupported")
    check_single(fields)


# ---------------------------------------------------------------- input


def input_messages(fields):
    """The messages that instructions and input stand for; items that are not for the model are left out."""
    items = [Item(role="user", content=fields.input)] if isinstance(fields.input, str) else fields.input
    made = [dict(role="system", content=fields.instructions)] if fields.instructions else []
    for i, item in enumerate(items):
        _add(made, f"input[{i}]", item)
    if not any(message["role"] != "system" for message in made):
        raise wrong_field("input", "expected at least one message, got none")
    return made


def _add(made, where, item) -> None:
    kind = item.type or "message"
    if kind == "message":
        _add_message(made, where, item)
    elif kind == "reasoning":
        part = "content" if item.content else "summary"
        _answer(made)["reasoning_content"] = text_of(getattr(item, part) or "", f"{where}.{part}", KINDS)
    elif kind == "function_call":
        call = called(item.call_id, item.name or "", item.arguments)
        _answer(made).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        made.append(
            dict(role="tool", tool_call_id=item.call_id, content=text_of(item.output or "", f"{where}.output", KINDS))
        )
    elif kind == "item_reference":
        raise wrong_field(where, "this server keeps no items, send them whole", "unsupported")


def _add_message(made, where, item) -> None:
    if item.role is None:
        raise wrong_field(f"{where}.role", "this field is required", "missing_field")
    content = text_of(item.content or "", f"{where}.content", KINDS)
    if item.role != "assistant":
        made.append(dict(role=item.role, content=content))
        return
    answer = _answer(made)
    answer["content"] = "\n".join(text for text in (answer["content"], content) if text)


def _answer(made):
    """The assistant's message that the items at the end belong to."""
    if not made or made[-1]["role"] != "assistant":
        made.append(dict(role="assistant", content=""))
    return made[-1]


# ---------------------------------------------------------------- tools and the form of the text


def tool_use(fields):
    """The ToolUse of tools and tool_choice."""
    tools = tools_of(fields.tools or (), ["function"])
    choice, parallel = fields.tool_choice or "auto", fields.parallel_tool_calls is not False
    if isinstance(choice, str):
        return choose(tools, choice, None, parallel)
    if choice.type == "function":
        return choose(tools, "required", [choice.name], False)
    if choice.type == "allowed_tools":
        names = [tool.get("name") for tool in choice.tools or () if tool.get("type") == "function"]
        return choose(tools, choice.mode or "auto", names, parallel)
    raise wrong_field(
        "tool_choice",
        f"expected none, auto, required, a function or allowed_tools, got {shown(choice.type)}",
        "unsupported",
    )


def grammar_of(fields):
    """The grammar that text.format asks for; None where the text is free."""
    wanted = fields.text.format if fields.text else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return structured.json_object()
    if wanted.schema_ is None:
        raise wrong_field("text.format.schema", "this field is required", "missing_field")
    with structured.told_as("text"):
        return structured.json_schema(wanted.schema_, bool(wanted.strict))
