"""JSON of receipts, which come from anybody: a text has one meaning or is refused.

Two readers could differ on a duplicate key, NaN, a number that is no integer, or a lone surrogate; so none is allowed.
Sizes and depth are bounded before anything is read.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from lockstep.receipts.errors import ReceiptError

MAX_BYTES = 64 << 20
MAX_DEPTH = 32
BLANK = " \t\n\r"  # what JSON allows around a value
MAX_INTEGER = 1 << 63
SURROGATE = re.compile("[\ud800-\udfff]")
# A text need not end, and none is searched twice (possessive): else one without an end is searched anew from each of
# its quotes, and a long one takes a hundred times its size in memory.
TEXT_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)


def loads(data: bytes | str, max_bytes: int = MAX_BYTES, *, has_reals: bool = False) -> Any:
    """The value of a JSON text: objects, arrays, strings, booleans, null and integers below 2**63. ReceiptError for
    anything else, and for a text that is larger than max_bytes or nested more than MAX_DEPTH deep.

    has_reals: whether there may be real numbers, as in an answer around a receipt.
    """
    if len(data) > max_bytes:
        raise ReceiptError(f"expected at most {max_bytes} bytes of JSON, got {len(data)}")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        text.encode("utf-8")
    except UnicodeError:
        raise ReceiptError("expected JSON in UTF-8, got other bytes") from None
    _check_depth(text)
    try:
        real = float if has_reals else _refused
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refused, parse_float=real, parse_int=_integer
        )
    except ReceiptError:
        raise
    except ValueError as error:
        raise ReceiptError(f"expected JSON: {error}") from None
    _check_texts(value)
    return value


def of_payload(payload: bytes) -> Any:
    """The value of an envelope's payload, which is a JSON text of its own; see `loads`."""
    try:
        return loads(payload)
    except ReceiptError as error:
        raise ReceiptError(f"the payload in the envelope: {error}") from None


def dumps(value: Any) -> bytes:
    """The shortest ASCII text of a value."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _check_depth(text: str) -> None:
    """ReceiptError for a value that is nested too deep. Of a text that is no JSON, such as a log, only what a reader
    would come to is looked at: it is refused as what it is."""
    if text.lstrip(BLANK)[:1] not in ("[", "{"):
        return
    depth = 0
    for found in TEXT_OR_BRACKET.finditer(text):
        mark = text[found.start()]
        depth += (mark in "[{") - (mark in "]}")
        if depth > MAX_DEPTH:
            raise ReceiptError(f"expected JSON of a depth of at most {MAX_DEPTH}, got more")
        if depth == 0:
            return


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ReceiptError(f"expected each key of a JSON object once, got {key!r:.80} twice")
        made[key] = value
    return made


def _check_texts(value: Any) -> None:
    """ReceiptError for a lone surrogate in any text of a value; escapes can write one."""
    if isinstance(value, str):
        if SURROGATE.search(value):
            raise ReceiptError(f"expected text, got a lone surrogate in {value!r:.80}")
    elif isinstance(value, (list, dict)):
        for each in value:
            _check_texts(each)
        for each in value.values() if isinstance(value, dict) else ():
            _check_texts(each)


def _refused(digits: str) -> NoReturn:
    raise ReceiptError(f"expected integers as numbers of JSON, got {digits:.40}")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -MAX_INTEGER <= int(digits) < MAX_INTEGER:
        raise ReceiptError(f"expected integers from -2**63 to 2**63 - 1, got {digits:.40}")
    return int(digits)
