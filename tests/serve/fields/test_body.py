"""Bodies within the limit of bytes, but with so many values that parsing them would block all other requests."""

import pytest

from lockstep.serve.app import make_app  # noqa: F401  makes every route's fields known
from lockstep.serve.errors import ApiError
from lockstep.serve.fields import body
from lockstep.serve.fields.body import Fields, Items
from lockstep.serve.fields.chat import ChatFields, arguments_of
from lockstep.serve.fields.response_format import json_schema
from lockstep.serve.limits import Limits
from tests.text.stalls import is_brief, longest_stall

MB = 1_000_000


def filled(head: str, item: str, tail: str, size: int = 8 * MB) -> bytes:
    return (head + ",".join([item] * ((size - len(head) - len(tail)) // (len(item) + 1))) + tail).encode()


def refusal_and_stall(raw: bytes, fields: type) -> tuple[str | None, float]:
    """The message that refuses a body, and the longest time for which parsing blocked other threads."""
    with longest_stall() as longest:
        try:
            body.parse_and_check(raw, fields, Limits())
            return None, longest[0]
        except ApiError as error:
            assert error.status == 400
            return error.message, longest[0]


MESSAGE = '{"role":"user","content":""}'


@pytest.mark.parametrize(
    "raw, says",
    [
        (filled('{"x":[', "[]", "]}"), "more than 32768 arrays and objects"),
        (filled('{"x":[', "{}", "]}"), "more than 32768 arrays and objects"),
        (filled('{"messages":[', MESSAGE, "]}"), "more than 32768 arrays and objects"),
        (filled('{"x":[', '{"a" :1,"b" :1,"c" :1,"d" :1,"e" :1,"f" :1}', "]}"), "more than 131072 fields"),
        (filled('{"x":[', "1", "]}"), "more than 1048576 values"),
        (
            ('{"x":{' + ",".join(f'"{i}":1' for i in range(20_000)) + "}}").encode(),
            "object of 20000 fields, at most 16384",
        ),
        (filled('{"messages":[', "1", "]}", 2 * MB), "messages[0]: expected"),
        (filled('{"messages":[{"role":"user","content":[', "1", "]}]}", 2 * MB), "messages[0].content[0]: expected"),
        (filled('{"messages":[],"tools":[', "1", "]}", 2 * MB), "tools[0]: expected"),
        (
            filled('{"messages":[],"allowed_token_ids":[', '"a"', "]}", 3 * MB),
            "allowed_token_ids[0]: expected an integer",
        ),
    ],
    ids=["lists", "objects", "messages", "fields", "numbers", "wide", "wrong messages", "parts", "tools", "ids"],
)
def test_many_small_values_are_refused_before_they_hold_up_anything(raw, says):
    found, stall = refusal_and_stall(raw, ChatFields)
    assert says in found and is_brief(stall)


@pytest.mark.parametrize("text", ["[{:,", r"\\\"[{:,", "\\u005b[,\\\\"])
def test_what_stands_inside_of_strings_does_not_count(text):
    content = text * (2 * MB // len(text))
    raw = f'{{"messages":[{{"role":"user","content":"{content}"}}]}}'.encode()
    assert refusal_and_stall(raw, ChatFields)[0] is None


@pytest.mark.parametrize(
    "read, says",
    [
        (arguments_of, "the text of a call's arguments has more than 32768 arrays"),
        (json_schema, "a JSON schema has more than 32768 arrays"),
    ],
)
def test_json_in_a_string_is_bounded_as_the_body_is(read, says):
    text = '{"a":[' + "[]," * 2_000_000 + "[]]}"
    with longest_stall() as longest, pytest.raises(ApiError, match=says):
        read(text)
    assert is_brief(longest[0])


def test_arrays_of_all_fields_end_at_their_first_wrong_item():
    def lists(schema):
        if isinstance(schema, dict):
            yield from [schema] if schema.get("type") == "list" else []
            schema = list(schema.values())
        for each in schema if isinstance(schema, (list, tuple)) else []:
            yield from lists(each)

    def all_of(kind):
        return [kind, *[each for sub in kind.__subclasses__() for each in all_of(sub)]]

    kinds = [kind for kind in all_of(Fields) if kind.__module__.startswith("lockstep.")]
    found = [(kind.__name__, schema) for kind in kinds for schema in lists(kind.__pydantic_core_schema__)]
    assert len(kinds) > 20 and len(found) > 20
    assert all(schema.get("fail_fast") for _, schema in found), [name for name, s in found if not s.get("fail_fast")]


def test_an_array_says_what_is_wrong_with_its_first_wrong_item():
    class Numbers(Fields):
        n: Items[int]

    with pytest.raises(ApiError, match=r'n\[1\]: expected an integer, got "a"'):
        body.parse_and_check(b'{"n": [1, "a", "b"]}', Numbers, Limits())
