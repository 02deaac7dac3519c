"""Request bodies: read under a limit, parsed strictly, checked field by field."""

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
# what pydantic calls by the names of Python's types and of our classes
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
UNION_MEMBERS = ("str", "int", "float", "bool", "dict", "list")  # how pydantic names them in the place of an error


def whole(value):
    """A number without a fraction, such as 5.0, as an integer; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]  # an integer, which some clients write as 5.0


def or_default(default: Any) -> BeforeValidator:
    """Marks the type of a field that has a default, which null stands for."""
    return BeforeValidator(lambda value: default if value is None else value)


class UntilFirstError:
    """Marks the type of an array that is not read beyond its first wrong item.

    Millions of wrong items would otherwise be as many errors, all made in one call that nothing interrupts.
    """

    def __get_pydantic_core_schema__(self, source, handler):
        return {**handler(source), "fail_fast": True}


def _meant(value: Any) -> str:
    return "(simple)" if value is None or isinstance(value, (str, int, float)) else "(container)"


T = TypeVar("T")
Simple = TypeVar("Simple")
Container = TypeVar("Container")
Items = Annotated[list[T], UntilFirstError()]
# A field that is either a simple value or an array or object. Errors are those of what was meant.
SimpleOr = Annotated[
    Annotated[Simple, Tag("(simple)")] | Annotated[Container, Tag("(container)")], Discriminator(_meant)
]


class Fields(BaseModel):
    """The fields of a body that a route reads. Types are strict; fields that nobody knows are ignored.

    Integers are of type Whole, arrays of type Items.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=False)


class Kinds(Fields):
    """An object of one of many kinds, which `type` names. Those that are not `read` may have any other fields."""

    read: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _only_type(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        return dict(type=kind) if isinstance(kind, str) and kind not in cls.read else value


async def read_fields(request, service, fields):
    """The body of a request that no Job reads, as a model of its fields, of which one is `model`.

    ApiError 4xx, or 503 while the model is loading; ClientDisconnect.
    """
    service.check_loaded()
    service.check_workers()
    raw = await read(request.receive, service.limits.body_seconds)
    found = await checked(service, fields, raw)
    service.name_in_answers(found.model)
    return found


async def read(receive, seconds):
    """The bytes of a body. ApiError 408 if they take too long; ClientDisconnect if the client leaves before the end."""
    try:
        async with asyncio.timeout(seconds):
            return await Request({"type": "http"}, receive).body()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="timeout") from None


async def checked(service, fields, raw):
    """A body's bytes as a model of its fields. ApiError 400. Long ones are parsed beside the event loop."""
    if len(raw) <= INLINE_BYTES:
        return parsed(raw, fields, service.limits)
    return await service.offload(parsed, raw, fields, service.limits)


def parsed(raw, fields, limits):
    """The same, at once."""
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
    # Nearly every body passes by these counts, which take in what only stands inside of strings.
    if not _passed(raw.count(b"[") + raw.count(b"{"), raw.count(b":"), raw.count(b","), limits):
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
            if allowed := _passed(containers, fields, values, limits):
                raise bad_request(f"{what} has more than {allowed}")


def loads(text: str, what: str) -> object:
    """The value of JSON that stands in a string of a body. ApiError 400 where it has too many values,
    ValueError where it is no JSON, RecursionError where it is nested too deeply."""
    check_size(text.encode(), Limits(), what)
    return json.loads(text)


def _passed(containers: int, fields: int, values: int, limits: Limits) -> str | None:
    """Which limit is passed, in words."""
    if containers > limits.max_containers:
        return f"{limits.max_containers} arrays and objects"
    if fields > limits.max_fields:
        return f"{limits.max_fields} fields in its objects"
    return f"{limits.max_values} values" if values > limits.max_values else None


def _object(pairs, max_fields):
    if len(pairs) > max_fields:
        raise bad_request(f"the body has an object of {len(pairs)} fields, at most {max_fields} are allowed")
    made = dict(pairs)
    if len(made) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise bad_request(f"the body has the field {shown(twice)} twice in one object")
    return made


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
    """A JSON object as a model of its fields. ApiError 400 that names the field, what was got and what is allowed."""
    try:
        return fields.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    where = place(first["loc"])
    if first["type"] == "missing":
        raise wrong_field(where, "this field is required", "missing_field")
    raise wrong_field(where, f"{wanted(first)}, got {shown(first['input'])}")


def place(location):
    """("stop", 2) as stop[2]. What unions add to say which of their members they tried is left out."""
    made = ""
    for part in location:
        if isinstance(part, int):
            made += f"[{part}]"
        elif part.isidentifier() and part not in UNION_MEMBERS:
            made += f".{part}" if made else part
    return made


def wanted(error):
    """What pydantic says would have been right, in our words and JSON's."""
    if error["type"] in JSON_NAMES:
        return f"expected {JSON_NAMES[error['type']]}"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "expected").replace("a valid ", "a ")


def shown(value):
    """A value as JSON, cut to what fits a sentence."""
    if isinstance(value, CONTAINERS) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    text = json.dumps(value, default=repr)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text)} characters)"
