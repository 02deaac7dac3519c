"""Request bodies: read within limits, parsed strictly, validated field by field."""

import asyncio
import json
import math
import re
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag, ValidationError, model_validator
from starlette.requests import Request

from lockstep.serve.errors import ApiError, bad_request, wrong_field
from lockstep.serve.limits import Limits

INLINE_BYTES = 32 << 10  # bodies up to here are parsed on the event loop
SHOWN_CHARS = 80
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
CONTAINERS = (dict, list)
MARKS = re.compile(rb'\\.|["\[{:,]', re.DOTALL)
# pydantic's error types whose own messages name Python's types or our classes
JSON_NAMES = dict(
    int_type="an integer",
    int_from_float="an integer",
    float_type="a number",
    bool_type="true or false",
    string_type="a string",
    dict_type="an object",
    list_type="an array",
    model_type="an object",
    model_attributes_type="an object",
)
UNION_MEMBERS = ("str", "int", "float", "bool", "dict", "list")  # pydantic's names for them in an error's location


def integral(value):
    """A number without a fraction, such as 5.0, as an integer; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(integral)]  # an integer, which some clients write as 5.0


def or_default(default: Any) -> BeforeValidator:
    """Marks the type of a field in which null means the default."""
    return BeforeValidator(lambda value: default if value is None else value)


class UntilFirstError:
    """Marks the type of an array whose validation ends at its first wrong item.

    Millions of wrong items would otherwise become millions of errors, in one call that no other thread can interrupt.
    """

    def __get_pydantic_core_schema__(self, source, handler):
        return {**handler(source), "fail_fast": True}


def _meant(value: Any) -> str:
    return "(simple)" if value is None or isinstance(value, (str, int, float)) else "(container)"


T = TypeVar("T")
Simple = TypeVar("Simple")
Container = TypeVar("Container")
Items = Annotated[list[T], UntilFirstError()]
# A field that is either a simple value, or an array or object. Errors name the one of the two that the client sent.
SimpleOr = Annotated[
    Annotated[Simple, Tag("(simple)")] | Annotated[Container, Tag("(container)")], Discriminator(_meant)
]


class Fields(BaseModel):
    """The fields of a body that a route reads. Types are strict, unknown fields are ignored.

    Subclasses declare integers as Whole and arrays as Items.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=False)


class TypedFields(Fields):
    """An object whose field `type` says which other fields it has. Objects of a type that is not in `known_types` are
    accepted with any fields, which are dropped."""

    known_types: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _only_type(cls, value: Any) -> Any:
        type_name = value.get("type") if isinstance(value, dict) else None
        return dict(type=type_name) if isinstance(type_name, str) and type_name not in cls.known_types else value


async def read_fields(request, service, fields):
    """The body of a request that generates nothing, as an object of the class `fields`, which has a field `model`.

    ApiError 4xx, or 503 while the model is loading; ClientDisconnect.
    """
    service.check_loaded()
    service.check_workers()
    raw = await read_body(request.receive, service.limits.body_seconds)
    found = await parse_and_check_async(service, fields, raw)
    service.name_in_answers(found.model)
    return found


async def read_body(receive, seconds):
    """The bytes of a body. ApiError 408 if they take too long; ClientDisconnect if the client leaves before the end."""
    try:
        async with asyncio.timeout(seconds):
            return await Request({"type": "http"}, receive).body()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="timeout") from None


async def parse_and_check_async(service, fields, raw):
    """`parse_and_check` for the event loop: long bodies are parsed in a worker thread."""
    if len(raw) <= INLINE_BYTES:
        return parse_and_check(raw, fields, service.limits)
    return await service.offload(parse_and_check, raw, fields, service.limits)


def parse_and_check(raw, fields, limits):
    """A body's bytes as an object of the class `fields`. ApiError 400."""
    return check(fields, parse(raw, limits))


def parse(body, limits):
    """A body as a JSON object. ApiError 400 for anything else, including NaN, infinity and lone surrogates."""
    check_size(body, limits)
    max_depth, max_fields = limits.max_depth, limits.max_object_fields
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=partial(_object, max_fields=max_fields),
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8 text: byte {error.start} is 0x{body[error.start]:02x}") from None
    except RecursionError:
        raise bad_request(f"the body is nested more than {max_depth} deep") from None
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, got {shown(value)}")
    _check_depth(value, max_depth)
    # surrogates can only come as escapes: the bytes themselves were valid UTF-8
    if SURROGATE_ESCAPE.search(body):
        _check_surrogates(value)
    return value


def check_size(raw: bytes, limits: Limits, what: str = "the body") -> None:
    """Raise ApiError 400 if a text of JSON has more arrays and objects, fields, or values than are allowed.

    It counts before anything is parsed: parsing a text, and freeing what came of it, are single calls that no other
    thread can interrupt, so that millions of small values in one body would hold up every other request.
    """
    # These counts include characters inside of strings, so they are upper bounds, which nearly every body satisfies.
    if not _exceeded_limit(raw.count(b"[") + raw.count(b"{"), raw.count(b":"), raw.count(b","), limits):
        return
    containers = fields = values = 0
    in_string = False
    for match in MARKS.finditer(raw):
        mark = raw[match.start()]
        if mark == ord('"'):
            in_string = not in_string
        elif not in_string:
            containers += mark in b"[{"
            fields += mark == ord(":")
            values += mark == ord(",")
            if limit := _exceeded_limit(containers, fields, values, limits):
                raise bad_request(f"{what} has more than {limit}")


def bounded_loads(text: str, what: str) -> object:
    """The value of a JSON text that stands in a string of a body; what: its name in errors. ApiError 400 where it has
    too many values, ValueError where it is not JSON, RecursionError where it is nested too deeply."""
    check_size(text.encode(), Limits(), what)
    return json.loads(text)


def _exceeded_limit(containers: int, fields: int, values: int, limits: Limits) -> str | None:
    """The limit that these numbers exceed, in words, or None."""
    if containers > limits.max_containers:
        return f"{limits.max_containers} arrays and objects"
    if fields > limits.max_fields:
        return f"{limits.max_fields} fields in its objects"
    return f"{limits.max_values} values" if values > limits.max_values else None


def _object(pairs, max_fields):
    if len(pairs) > max_fields:
        raise bad_request(f"the body has an object of {len(pairs)} fields, at most {max_fields} are allowed")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise bad_request(f"the body has the field {shown(twice)} twice in one object")
    return fields


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def _finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:SHOWN_CHARS]} is too large for a number")
    return value


def _check_depth(value, max_depth):
    level = [value]
    for _ in range(max_depth):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [v for values in inner for v in values if isinstance(v, CONTAINERS)]
        if not level:
            return
    raise bad_request(f"the body is nested more than {max_depth} deep")


def _check_surrogates(value) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise bad_request(f"the body has a lone surrogate, U+{code:04X}, which is not text") from None


def check(fields, value):
    """A JSON object as an object of the class `fields`. ApiError 400 that names the field, what is allowed and got."""
    try:
        return fields.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    where = field_path(first["loc"])
    if first["type"] == "missing":
        raise wrong_field(where, "this field is required", "missing_field")
    raise wrong_field(where, f"{expectation(first)}, got {shown(first['input'])}")


def field_path(location):
    """pydantic's location of an error, ("stop", 2), as stop[2], without the names of a union's members."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in UNION_MEMBERS:
            path += f".{part}" if path else part
    return path


def expectation(error):
    """What a pydantic error expected, in JSON's words: "expected an integer"."""
    if error["type"] in JSON_NAMES:
        return f"expected {JSON_NAMES[error['type']]}"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "expected").replace("a valid ", "a ")


def shown(value):
    """A value as JSON, cut to a length that fits a sentence."""
    if isinstance(value, CONTAINERS) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    text = json.dumps(value, default=repr)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text)} characters)"
