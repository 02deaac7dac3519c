"""How much a JSON text holds, counted before it is parsed.

Parsing a text, and freeing what came of it, are single calls that no other thread can interrupt: millions of small
values in one body would hold up every other request.
"""

import json
import re

from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.limits import Limits

MARKS = re.compile(rb'\\.|["\[{:,]', re.DOTALL)


def check_size(raw: bytes, limits: Limits, what: str = "the body") -> None:
    """Raise ApiError 400 if a text of JSON has more arrays and objects, fields, or values than are allowed."""
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
