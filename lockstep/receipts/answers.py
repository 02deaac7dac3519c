"""Receipts as files have them: alone, one on each line, or within an answer of the API."""

import json
from dataclasses import dataclass, replace
from typing import Any

from lockstep.receipts import strict_json
from lockstep.receipts.envelope import TYPES, Envelope, from_object
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import is_token
from lockstep.receipts.verdict import FALSE, Verdict

MAX_RECEIPTS = 1 << 20


@dataclass(frozen=True)
class Answered:
    """A receipt, and what the answer around it says of itself: its token ids and its text, where it does."""

    envelope: Envelope
    token_ids: list[int] | None = None
    text: str | None = None
    is_within: bool = False  # whether there is an answer around it

    def with_text(self, verdict: Verdict, prompt: str) -> Verdict:
        """The verdict, which is false where the answer shows another text than its tokens have. The prompt may stand
        before it, as `echo` asks."""
        if not verdict.is_true or self.text is None or self.text in (verdict.text, prompt + verdict.text):
            return verdict
        reason = "the answer shows another text than its tokens have"
        return replace(verdict, code=FALSE, what="text", claimed=self.text, found=verdict.text, reason=reason)


def answered(text: str) -> list[Answered]:
    """The receipts in a text: an envelope, an API's answer that has some, or one of these on each line. ReceiptError
    for anything else."""
    whole = text.strip()
    lines = whole.splitlines() if "\n" in whole and _is_json(whole.partition("\n")[0]) else [whole]
    if len(lines) > MAX_RECEIPTS:
        raise ReceiptError(f"expected at most {MAX_RECEIPTS} receipts, got {len(lines)}")
    found: list[Answered] = []
    for number, line in enumerate(lines, 1):
        try:
            found += _in_value(_loads(line))
        except ReceiptError as error:
            raise ReceiptError(f"line {number}: {error}" if len(lines) > 1 else str(error)) from None
    return found


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _loads(line: str) -> Any:
    """A value of JSON. That of an API's answer, whose own fields have any numbers, is read as usual."""
    try:
        return strict_json.loads(line)
    except ReceiptError as strict:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise strict from None
        if not isinstance(value, dict) or "payload" in value:
            raise
        return value


def _in_value(value: Any) -> list[Answered]:
    if isinstance(value, dict) and "payloadType" not in value:
        if "choices" in value and isinstance(value["choices"], list):
            found = [_in_choice(choice) for choice in value["choices"]]
            if None in found and any(found):
                raise ReceiptError(f"choice {found.index(None)} has no receipt, others have one")
        else:
            found = [_in_choice(value)]
        return [each for each in found if each is not None] or _none(value)
    return [Answered(from_object(value, TYPES))]


def _none(value: dict[str, Any]) -> list[Answered]:
    got = ", ".join(value)[:80] or "nothing"
    raise ReceiptError(f"expected a receipt, or an answer with one, got an object with {got}")


def _in_choice(choice: Any) -> Answered | None:
    """The receipt of a choice, or of a whole answer; None where it has none."""
    if not isinstance(choice, dict) or not choice.get("receipt"):
        return None
    ids, text = choice.get("token_ids"), choice.get("text")
    is_known = isinstance(ids, list) and all(map(is_token, ids))
    return Answered(
        from_object(choice["receipt"], TYPES), ids if is_known else None, text if isinstance(text, str) else None, True
    )


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
