"""Reads receipts in any of the forms in which Python has them."""

from lockstep.receipts import envelope
from lockstep.receipts.envelope import RECEIPT, Envelope, check_type
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.receipt import Receipt
from lockstep.receipts.statement import Statement, from_bytes


def envelope_of(receipt: Receipt | Envelope | bytes | str) -> Envelope:
    """The envelope of a receipt. ReceiptError for what is none."""
    if isinstance(receipt, Receipt):
        return receipt.envelope
    if isinstance(receipt, Envelope):
        return receipt
    if not isinstance(receipt, (bytes, str)):
        raise ReceiptError(f"expected a receipt or its JSON text, got {receipt!r:.80}")
    return envelope.from_bytes(receipt, [RECEIPT])


def statement_of(receipt: Receipt | Envelope | bytes | str) -> Statement:
    """The Statement of a receipt. ReceiptError for what is none."""
    found = envelope_of(receipt)
    check_type(found, RECEIPT)
    return from_bytes(found.payload)
