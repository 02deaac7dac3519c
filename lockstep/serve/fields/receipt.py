"""`receipt`: whether an answer comes with a receipt, and what that is to have."""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.receipt import ReceiptOptions
from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import SimpleOr
from lockstep.serve.fields.known import OnlyFields


class ReceiptFields(OnlyFields):
    """What a receipt is to have. nonce: a text of the client's, which also draws the seed of a request without one."""

    inside: ClassVar = "receipt."

    tags: bool | None = None
    detached: bool | None = None
    hide_prompt: bool | None = None
    nonce: Annotated[str, Field(max_length=128)] | None = None


def _bool_or_object(value: Any) -> Any:
    if not (value is None or isinstance(value, (bool, dict))):
        allowed = ", ".join(ReceiptFields.model_fields)
        raise ValueError(f"expected true, false or an object with any of {allowed}")
    return value


# a field of a request
Receipt = Annotated[SimpleOr[bool, ReceiptFields] | None, BeforeValidator(_bool_or_object)]


def _check_detached(fields: Any) -> None:
    """ApiError 400 for an answer from which nobody could verify a receipt without tokens, as it has none either."""
    if getattr(fields, "return_token_ids", None) and not getattr(fields, "is_empty", False):
        return
    if not hasattr(fields, "return_token_ids"):
        problem = "answers of this route have no token ids, without which nobody can verify it; expected false or none"
    elif getattr(fields, "is_empty", False):
        problem = "expected false or none with max_tokens 0: the token that the receipt is of is not in the answer"
    else:
        problem = "expected return_token_ids to be true, too: without them nobody can verify it"
    raise wrong_field("receipt.detached", problem, "unsupported")


def receipt_options(fields: Any, endpoint: str, key: Any) -> ReceiptOptions | None:
    """The ReceiptOptions of a request's fields, if it asks for a receipt. ApiError 400 for what is not allowed.

    endpoint: the path of the API. key: signs the receipt; or None.
    """
    asked = getattr(fields, "receipt", None)
    if not asked:
        return None
    if asked is True:
        return ReceiptOptions(endpoint=endpoint, key=key)
    if asked.detached:
        _check_detached(fields)
    try:
        return ReceiptOptions(
            tags=bool(asked.tags),
            is_detached=bool(asked.detached),
            hides_prompt=bool(asked.hide_prompt),
            nonce=asked.nonce,
            endpoint=endpoint,
            key=key,
        )
    except ReceiptError as error:
        raise wrong_field("receipt", str(error)) from None
