"""The error of receipts."""


class ReceiptError(ValueError):
    """A receipt that cannot be read, or a request of which none can be made; the message says why in one sentence."""
