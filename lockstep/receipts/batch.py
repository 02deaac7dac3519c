"""One signature for many answers: a batch is the root of a tree over the payloads of their receipts, in order.

A whole run of an evaluation is signed at once, its receipts need no signatures of their own, and one of them can be
shown with a path of O(log n) nodes to the signed root.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lockstep.receipts import strict_json
from lockstep.receipts.envelope import BATCH, RECEIPT, Envelope, check_type
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import reading, shown
from lockstep.receipts.merkle import inclusion_path, is_included, leaf_hash, root

VERSION = 1
MAX_ANSWERS = 1 << 24


class Batch(NamedTuple):
    """How many receipts a batch has, and the root over them."""

    num_answers: int
    root: bytes

    def to_bytes(self) -> bytes:
        """The payload of its envelope."""
        return strict_json.dumps(dict(version=VERSION, answers=self.num_answers, root=self.root.hex()))


class Place(NamedTuple):
    """The place of one receipt in a batch. path: the nodes that lead from it to the root."""

    index: int
    path: list[bytes]


def batch_of(receipts: Sequence[Envelope]) -> Batch:
    """The Batch of receipts, in this order. ReceiptError for none."""
    if not receipts:
        raise ReceiptError("batch: expected one receipt or more, got none")
    for receipt in receipts:
        check_type(receipt, RECEIPT)
    return Batch(len(receipts), root([leaf_hash(receipt.payload) for receipt in receipts]))


def read_batch(envelope: Envelope) -> Batch:
    """The Batch in an envelope. ReceiptError for anything else."""
    check_type(envelope, BATCH)
    with reading(strict_json.loads(envelope.payload), "batch.") as fields:
        version = fields.take("version")
        if version != VERSION or type(version) is not int:
            fields.refuse("version", f"expected {VERSION}, got {shown(version)}")
        made = Batch(fields.integer("answers", 1, MAX_ANSWERS), fields.hex("root", 32))
    return made


def place_of(receipts: Sequence[Envelope], index: int) -> Place:
    """The Place of a receipt of a batch."""
    return Place(index, inclusion_path([leaf_hash(receipt.payload) for receipt in receipts], index))


def has(batch: Batch, receipt: Envelope, place: Place) -> bool:
    """Whether a receipt is at its place in a batch."""
    return is_included(leaf_hash(receipt.payload), place.index, batch.num_answers, place.path, batch.root)
