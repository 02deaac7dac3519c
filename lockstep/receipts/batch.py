"""One signature for many answers: a batch is the root of a tree over the payloads of their receipts, in order.

A whole run of an evaluation is signed at once, its receipts need no signatures of their own, and one of them can be
shown with a path of O(log n) nodes to the signed root.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lockstep.receipts import strict_json
from lockstep.receipts.envelope import BATCH, RECEIPT, Envelope, check_type, from_object
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import HEX, reading, shown
from lockstep.receipts.merkle import HASH_BYTES, inclusion_path, is_included, leaf_hash, root

VERSION = 1
MAX_ANSWERS = 1 << 24
MAX_PATH = 24  # nodes, which lead to the root over MAX_ANSWERS


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
    with reading(strict_json.of_payload(envelope.payload), "batch.") as fields:
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


class Member(NamedTuple):
    """A receipt, its batch and its place there: what shows that the one signature of a whole run is also the
    receipt's."""

    receipt: Envelope
    batch: Envelope
    place: Place

    @property
    def is_true(self) -> bool:
        """Whether the receipt is at its place in the batch. ReceiptError for what is no batch."""
        return has(read_batch(self.batch), self.receipt, self.place)

    def to_object(self) -> dict[str, Any]:
        """The member as an object of JSON."""
        index, path = self.place
        envelopes = dict(receipt=self.receipt.to_object(), batch=self.batch.to_object())
        return envelopes | dict(index=index, path=[node.hex() for node in path])


def member_of(receipts: Sequence[Envelope], batch: Envelope, index: int) -> Member:
    """The Member of a batch that is receipt number `index`. ReceiptError for receipts that are not those of the batch,
    and for a number that none of them has."""
    if batch_of(receipts) != read_batch(batch):
        raise ReceiptError("the receipts, or their order, are not those of the batch")
    if not 0 <= index < len(receipts):
        raise ReceiptError(f"expected the number of a receipt from 0 to {len(receipts) - 1}, got {index}")
    return Member(receipts[index], batch, place_of(receipts, index))


def is_member(value: dict[str, Any]) -> bool:
    """Whether an object of JSON is meant as a Member."""
    return "batch" in value and "path" in value


def read_member(value: Any) -> Member:
    """The Member of an object of JSON. ReceiptError for anything else."""
    with reading(value, "member.") as fields:
        receipt, batch = from_object(fields.take("receipt"), [RECEIPT]), from_object(fields.take("batch"), [BATCH])
        index = fields.integer("index", 0, MAX_ANSWERS - 1)
        path = fields.items("path", MAX_PATH, _is_node, f"texts of {2 * HASH_BYTES} hexadecimal digits")
    return Member(receipt, batch, Place(index, [bytes.fromhex(node) for node in path]))


def _is_node(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 2 * HASH_BYTES and HEX.fullmatch(value) is not None
