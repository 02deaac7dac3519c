"""Receipts as files have them: alone, one on each line, within an answer of the API or a saved stream of it, or with
the place that each has in a batch."""

import json
from dataclasses import dataclass, replace
from typing import Any

from lockstep.receipts import strict_json
from lockstep.receipts.around import streams
from lockstep.receipts.around.shapes import choices_of, shown_in
from lockstep.receipts.around.shown import Shown
from lockstep.receipts.batch import Member, is_member, read_member
from lockstep.receipts.envelope import TYPES, Envelope, from_object
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import is_token
from lockstep.receipts.statement import salt_of

MAX_RECEIPTS = 1 << 20


@dataclass(frozen=True)
class Answered:
    """A receipt, and what is around it. shown: by the answer that has it, if it is within one; salt: of its hidden
    prompt, which is beside it there; member: its place in a batch, if that is given. place: in the file, in words: ""
    for the only one."""

    envelope: Envelope
    shown: Shown | None = None
    salt: bytes | None = None
    member: Member | None = None
    place: str = ""


@dataclass(frozen=True)
class Unreadable:
    """A line of a file that has no receipt. place: in the file, in words; reason: why not."""

    place: str
    reason: str


def answered(text: str) -> list[Answered]:
    """The receipts in a text: an envelope, an API's answer that has some, or one of these on each line; or a stream.
    ReceiptError for anything else."""
    found = []
    for each in found_in(text):
        if isinstance(each, Unreadable):
            raise ReceiptError(f"{each.place}: {each.reason}")
        found.append(each)
    return found


def found_in(text: str) -> list[Answered | Unreadable]:
    """As `answered`, but a line without a receipt beside others is Unreadable. ReceiptError for a text without any."""
    whole = text.strip().removeprefix("\ufeff")
    if not whole:
        raise ReceiptError("expected a receipt, or an answer with one, got an empty text")
    if streams.is_stream(whole):
        return [*_in_answer(streams.joined(whole), is_stream=True)]
    lines = lines_of(whole)
    if len(lines) > MAX_RECEIPTS:
        raise ReceiptError(f"expected at most {MAX_RECEIPTS} receipts, got {len(lines)}")
    if len(lines) == 1:
        return [*_in_value(_loads(whole))]
    return [each for number, line in enumerate(lines, 1) if line.strip() for each in _in_line(f"line {number}", line)]


def lines_of(text: str) -> list[str]:
    """The lines of a text where each is a value of JSON; else the text alone."""
    whole = text.strip()
    return whole.split("\n") if "\n" in whole and _is_json(whole.partition("\n")[0]) else [whole]


def _in_line(place: str, line: str) -> list[Answered | Unreadable]:
    try:
        found = _in_value(_loads(line))
    except ReceiptError as error:
        return [Unreadable(place, str(error))]
    return [replace(each, place=f"{place}, {each.place}" if each.place else place) for each in found]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _loads(line: str) -> Any:
    """A value of JSON, in which real numbers are those of an answer: a receipt's own fields have other types."""
    return strict_json.loads(line, has_reals=True)


def _in_value(value: Any) -> list[Answered]:
    if not isinstance(value, dict) or "payloadType" in value:
        return [Answered(from_object(value, TYPES))]
    if is_member(value):
        member = read_member(value)
        return [Answered(member.receipt, member=member)]
    return _in_answer(_unwrapped(value))


def _unwrapped(value: dict[str, Any]) -> dict[str, Any]:
    """The answer in the last event of a stream of /v1/responses, or in a line of a batch of requests."""
    for name in ("response", "body"):
        if isinstance(value.get(name), dict):
            value = value[name]
    return value


def _in_answer(answer: dict[str, Any], is_stream: bool = False) -> list[Answered]:
    choices = choices_of(answer)
    found = [_in_choice(choice, answer, is_stream) for choice in choices]
    if None in found and any(found):
        raise ReceiptError(f"choice {found.index(None)} has no receipt, others have one")
    made = [each for each in found if each is not None]
    if not made:
        got = ", ".join(map(str, answer))[:80] or "nothing"
        raise ReceiptError(f"expected a receipt, or an answer with one, got an object with {got}")
    return made if len(made) == 1 else [replace(each, place=f"choice {i}") for i, each in enumerate(made)]


def _in_choice(choice: Any, answer: dict[str, Any], is_stream: bool) -> Answered | None:
    """The receipt of a choice, or of a whole answer; None where it has none."""
    if not isinstance(choice, dict) or not choice.get("receipt"):
        return None
    salt = choice.get("receipt_salt")
    shown = shown_in(choice, answer, is_stream)
    return Answered(from_object(choice["receipt"], TYPES), shown, None if salt is None else salt_of(salt))


def token_ids_in(text: str) -> list[int]:
    """The token_ids of an answer in JSON: of its only choice, of an object, or a list of them. ReceiptError where there
    are none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("choices"), list) and len(value["choices"]) == 1:
        value = value["choices"][0]
    ids = value.get("token_ids") if isinstance(value, dict) else value
    if not isinstance(ids, list) or not all(map(is_token, ids)):
        raise ReceiptError("answer: expected JSON with the token_ids of one answer (return_token_ids asks for them)")
    return ids
