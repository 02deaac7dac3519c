"""The fields for constrained decoding: OpenAI's response_format, and those of vLLM and llama.cpp."""

from typing import ClassVar

from pydantic import Field

from lockstep.serve.errors import bad_request, wrong_field
from lockstep.serve.fields.body import Fields, Items, SimpleOr, bounded_loads, shown
from lockstep.serve.fields.known import STRUCTURED, KnownFields
from lockstep.serve.service import Service
from lockstep.text.grammars import structured
from lockstep.text.grammars.structured import errors_about


class SchemaFields(Fields):
    """A JSON schema with the name and strictness that OpenAI's API adds."""

    name: str | None = None
    schema_: dict | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """The required format of the answer's text."""

    type: str
    json_schema: SchemaFields | None = None
    schema_: dict | None = Field(None, alias="schema")
    pattern: str | None = None
    grammar: str | None = None


class StructuredOutputs(KnownFields):
    """vLLM's extension: exactly one of these fields constrains the answer."""

    refused: ClassVar = STRUCTURED
    inside: ClassVar = "structured_outputs."

    json_: SimpleOr[str, dict] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class ResponseFormatFields(Fields):
    """All fields that constrain the format of an answer; a request may use one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SimpleOr[str, dict] | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    json_schema: SimpleOr[str, dict] | None = None  # llama.cpp's name for guided_json
    grammar: str | None = None  # llama.cpp's field, in GBNF; "" means no grammar

    @property
    def format_fields(self) -> list[str]:
        """The names of these fields that the request has."""
        return [
            name
            for name in ResponseFormatFields.model_fields
            if (value := getattr(self, name)) is not None and not (name == "grammar" and not value)
        ]


def masks(service: Service, fields, num_prompts):
    """A mask for each prompt of a request with ResponseFormatFields, or None. ApiError 400 for an invalid format."""
    if service.chat is None:
        raise bad_request("this model has no tokenizer, so its answers have no form", "response_format", "no_tokenizer")
    grammar = grammar_of(fields)
    with errors_about(format_field(fields)):
        if grammar is None:
            return [None] * num_prompts
        return [service.chat.grammars.mask(grammar, fields.num_samples) for _ in range(num_prompts)]


def format_field(fields) -> str:
    """The name of the field that constrains the answer's format; "grammar" where there is none."""
    return (fields.format_fields or ["grammar"])[0]


def grammar_of(fields):
    """The grammar of a request with ResponseFormatFields; None for free text."""
    with errors_about(format_field(fields)):
        return _grammar_of(fields)


def _grammar_of(fields):
    options, extension = fields.response_format, fields.structured_outputs or StructuredOutputs.model_validate({})
    given = {
        "response_format": _format_grammar(options) if options else None,
        "guided_json": _maybe(json_schema, fields.guided_json, extension.json_),
        "guided_regex": _maybe(structured.regex, fields.guided_regex, extension.regex),
        "guided_choice": _maybe(structured.choice, fields.guided_choice, extension.choice),
        "guided_grammar": _maybe(structured.lark_or_gbnf, fields.guided_grammar, extension.grammar),
        "grammar": _maybe(structured.lark_or_gbnf, fields.grammar or None, None),
        "json_schema": _maybe(json_schema, fields.json_schema, None),
        "json_object": structured.json_object() if extension.json_object else None,
    }
    found = {name: grammar for name, grammar in given.items() if grammar is not None}
    if len(found) > 1:
        raise bad_request(f"expected at most one form of the answer, got {' and '.join(found)}", next(iter(found)))
    return next(iter(found.values()), None)


def _maybe(make_grammar, first, second):
    """The grammar of the first value that is not None, or None."""
    value = first if first is not None else second
    return None if value is None else make_grammar(value)


def json_schema(schema, strict: bool = True):
    """The grammar of a JSON schema, which may be an object or its JSON text."""
    if isinstance(schema, str):
        try:
            schema = bounded_loads(schema, "a JSON schema")
        except (ValueError, RecursionError):
            raise ValueError("JSON schema: expected an object or its JSON text") from None
    return structured.json_schema(schema, strict)


def _format_grammar(options):
    format_type, wrapped = options.type, options.json_schema
    schema = options.schema_ if wrapped is None else wrapped.schema_
    if format_type == "text":
        return None
    if format_type in ("json_object", "json_schema") and schema is not None:
        return structured.json_schema(schema, bool(wrapped and wrapped.strict))
    if format_type == "json_object":
        return structured.json_object()
    if format_type == "regex" and options.pattern is not None:
        return structured.regex(options.pattern)
    if format_type == "grammar" and options.grammar is not None:
        return structured.lark_or_gbnf(options.grammar)
    expected = "text, json_object, json_schema with its schema, regex with a pattern, or grammar with a grammar"
    raise wrong_field("response_format", f"expected {expected}, got {shown(format_type)}")
