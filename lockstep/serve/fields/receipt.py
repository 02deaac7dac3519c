"""`receipt`: whether an answer comes with a receipt, and what that is to have."""

from typing import Annotated, Any

from pydantic import Field

from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.receipt import ReceiptOptions
from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import Fields


class ReceiptFields(Fields):
    """What a receipt is to have. nonce: a text of the client's, which also draws the seed of a request without one."""

    tags: bool | None = None
    detached: bool | None = None
    hide_prompt: bool | None = None
    nonce: Annotated[str, Field(max_length=128)] | None = None


def receipt_options(fields: Any, endpoint: str, key: Any) -> ReceiptOptions | None:
    """The ReceiptOptions of a request's fields, if it asks for a receipt. ApiError 400 for a nonce that is not allowed.

    endpoint: the path of the API. key: signs the receipt; or None.
    """
    asked = getattr(fields, "receipt", None)
    if not asked:
        return None
    if asked is True:
        return ReceiptOptions(endpoint=endpoint, key=key)
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
