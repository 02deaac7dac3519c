"""Constrained decoding and tool calls for `LLM`: from schemas, patterns, grammars and tools to masks, and from an
answer's text to its thoughts, content and calls."""

import json
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, replace
from typing import Any

from lockstep.completion import ToolCall
from lockstep.engine.request import SamplingParams, check_params
from lockstep.text.conversation import Conversation
from lockstep.text.grammars import structured
from lockstep.text.grammars.mask import MAX_SAMPLES
from lockstep.text.templates.chat_template import check_messages
from lockstep.text.tool_calls.tools import NO_PARAMETERS, Tool, ToolUse

log = logging.getLogger("lockstep.llm")
MODES = ("auto", "required", "none")
# what `render` passes itself, and arguments that belong elsewhere
NOT_VARIABLES = {"messages", "tool", "add_generation_prompt", *(f.name for f in fields(SamplingParams))}


def grammar_of(schema: Any = None, regex: Any = None, grammar: Any = None) -> tuple[str, str] | None:
    """(name of the argument, its grammar as `Grammars.mask` takes it) of the one that is given; None without any.

    schema: a JSON schema, as an object or as JSON text; every keyword of it is enforced or refused. regex: a pattern
    that the whole answer matches, in Rust's syntax. grammar: Lark, or llama.cpp's GBNF. ValueError for more than one,
    and for one that is wrong.
    """
    given = {
        name: value for name, value in dict(schema=schema, regex=regex, grammar=grammar).items() if value is not None
    }
    if len(given) > 1:
        raise ValueError(f"expected at most one of schema, regex and grammar, got {' and '.join(given)}")
    for name, value in given.items():
        with structured.errors_about(name):
            return name, _MAKERS[name](value)
    return None


def _of_schema(schema: Any) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise ValueError(f"expected a JSON schema or its text, got {schema!r:.80}") from None
    return structured.json_schema(schema)


_MAKERS = dict(schema=_of_schema, regex=structured.regex, grammar=structured.lark_or_gbnf)


def with_grammar(
    params: Sequence[SamplingParams], grammar: tuple[str, str] | None, grammars: structured.Grammars, max_requests: int
) -> list[SamplingParams]:
    """The params of several prompts with masks that hold every sample to a grammar of `grammar_of`.

    Samples that run together need a compiled grammar each, since reading tokens changes it. It is compiled here once,
    which finds its errors, and again as each sample begins; a mask keeps the compiled grammars of its MAX_SAMPLES last
    samples. Where more requests than that run together, each prompt has a mask of its own.
    """
    if grammar is None:
        return list(params)
    name, text = grammar
    for each in params:
        check_params(each)
        check_no_mask(each, name)
    with structured.errors_about(name):
        masks = [grammars.mask(text) for _ in (params if max_requests > MAX_SAMPLES else params[:1])]
    return [replace(each, logits_mask=masks[i % len(masks)]) for i, each in enumerate(params)]


def check_no_mask(params: SamplingParams, name: str) -> None:
    """ValueError for params with a mask beside the argument `name`, which needs one of its own."""
    if params.logits_mask is not None:
        raise ValueError(f"{name}: the params have a logits_mask already; expected one of the two")


def check_schema(tool: Tool, grammars: structured.Grammars, checked: Set[str]) -> set[str]:
    """Logs a warning if a tool is not strict and a part of its schema cannot be enforced. checked: schemas, as JSON
    text, that were checked before; returns this one."""
    schema = json.dumps(tool.arguments, sort_keys=True)
    if not tool.strict and schema not in checked:
        try:
            with structured.errors_about(f"tools: the parameters of {tool.name} are not enforced in full"):
                grammars.check(structured.json_schema(tool.arguments))
        except ValueError as error:
            log.warning(str(error))
    return {schema}


def with_options(params: SamplingParams, options: Mapping[str, Any]) -> SamplingParams:
    """The params with what a conversation needs: a mask, and special tokens in the text, which its parser reads."""
    return replace(params, **{name: value for name, value in options.items() if value is not None})


def conversation(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str,
    grammar: tuple[str, str] | None,
    variables: Mapping[str, Any],
) -> Conversation:
    """The Conversation of `LLM.chat`'s arguments. Arguments of earlier calls may be JSON text, as OpenAI has them."""
    check_messages(messages)
    if not messages:
        raise ValueError("messages: expected at least one message, got none")
    use = _tool_use(tools, tool_choice)
    name, text = grammar or ("grammar", None)
    if use.must_call and grammar is not None:
        raise ValueError(f"{name}: the answer has to be a tool call, so it cannot have another form")
    if strange := sorted(variables.keys() & NOT_VARIABLES):
        raise ValueError(f"{strange[0]}: this is no variable of the chat template; SamplingParams are `params`")
    return Conversation([_message(i, message) for i, message in enumerate(messages)], use, text, variables, form=name)


def _message(index: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A message in the form that chat templates expect."""
    where = f"messages[{index}]"
    made = {**given, "content": _text_of(given.get("content"), f"{where}.content")}
    if (calls := made.get("tool_calls")) is not None:
        if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
            raise ValueError(f"{where}.tool_calls: expected a list of calls, got {calls!r:.80}")
        made["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
        if not calls:
            del made["tool_calls"]
    return made


def _text_of(content: Any, where: str) -> str:
    """The text of content: a string, a list of text parts as OpenAI's API has them, or None."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}: expected a text or a list of text parts, got {content!r:.80}")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise ValueError(f'{where}[{i}]: expected {{"type": "text", "text": ...}}, got {part!r:.80}')
    return "\n".join(part["text"] for part in content)


def _call(where: str, given: Any) -> dict[str, Any]:
    """A call of an earlier answer in the form that chat templates expect: with its arguments as an object."""
    call = given.as_message() if isinstance(given, ToolCall) else given
    try:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        if not (isinstance(arguments, Mapping) and isinstance(function["name"], str) and isinstance(call["id"], str)):
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        expected = '{"id": ..., "function": {"name": ..., "arguments": an object or its JSON text}}'
        raise ValueError(f"{where}: expected {expected}, got {given!r:.120}") from None
    return {**call, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _tool_use(tools: Sequence[Mapping[str, Any]] | None, choice: str) -> ToolUse:
    """The ToolUse of tools as OpenAI's API has them, or of their functions alone. choice: "auto", "required", "none" or
    the name of the tool to call."""
    if tools is not None and (isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence)):
        raise ValueError(f"tools: expected a list of functions, got {tools!r:.80}")
    made = tuple(_tool(i, tool) for i, tool in enumerate(tools or ()))
    if not isinstance(choice, str):
        raise ValueError(f"tool_choice: expected {', '.join(MODES)} or the name of a tool, got {choice!r:.80}")
    if choice == "none":
        return ToolUse()
    if choice in MODES:
        return ToolUse(made, choice == "required")
    return ToolUse(made, True, (choice,), False)


def _tool(index: int, given: Mapping[str, Any]) -> Tool:
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        wanted = '{"type": "function", "function": {"name", "description", "parameters"}}'
        raise ValueError(f"tools[{index}]: expected {wanted}, got {given!r:.120}")
    parameters = function.get("parameters") or NO_PARAMETERS
    return Tool(function["name"], function.get("description") or "", parameters, bool(function.get("strict")))
