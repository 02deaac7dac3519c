"""A payload and its signatures in a DSSE envelope (Dead Simple Signing Envelope, version 1).

What is signed are the payload's very bytes with their type before them, so that no canonical form of JSON is needed. An
envelope without a signature is allowed here: it says what was computed, not who says so.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.receipts import strict_json
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import Fields, from_base64, reading, shown, to_base64
from lockstep.receipts.keys import PublicKey, SigningKey

RECEIPT = "application/vnd.lockstep.receipt+json"
BATCH = "application/vnd.lockstep.receipt-batch+json"
TYPES = (RECEIPT, BATCH)
MAX_SIGNATURES = 8
SIGNATURE_BYTES = 64


@dataclass(frozen=True)
class Signature:
    """A signature, and the id of the key that made it, by which a reader finds the key."""

    key_id: str
    signature: bytes


@dataclass(frozen=True)
class Envelope:
    """A payload, its type (one of TYPES) and its signatures, which may be none."""

    payload: bytes
    type: str = RECEIPT
    signatures: tuple[Signature, ...] = ()

    def signed(self, key: SigningKey) -> "Envelope":
        """The envelope with one more signature."""
        made = Signature(key.public.id, key.sign(pae(self.type, self.payload)))
        return Envelope(self.payload, self.type, (*self.signatures, made))

    def is_signed_by(self, key: PublicKey) -> bool:
        """Whether one of the signatures is this key's."""
        message = pae(self.type, self.payload)
        return any(key.is_signature(each.signature, message) for each in self.signatures)

    @property
    def digest(self) -> str:
        """SHA-256 of the payload, 64 hexadecimal digits, by which people may call a receipt."""
        return hashlib.sha256(self.payload).hexdigest()

    def to_object(self) -> dict[str, Any]:
        """The envelope as an object of JSON."""
        signatures = [dict(keyid=each.key_id, sig=to_base64(each.signature)) for each in self.signatures]
        return dict(payloadType=self.type, payload=to_base64(self.payload), signatures=signatures)

    def to_bytes(self) -> bytes:
        """The envelope as JSON text."""
        return strict_json.dumps(self.to_object())


def from_object(value: Any, types: Sequence[str] = TYPES) -> Envelope:
    """The Envelope of a JSON object. ReceiptError for anything else, and for a type that is not one of `types`."""
    with reading(value, "envelope.") as fields:
        kind = fields.text("payloadType", 80)
        if kind not in types:
            fields.refuse("payloadType", f"expected {' or '.join(types)}, got {shown(kind)}")
        payload = from_base64(fields.text("payload", strict_json.MAX_BYTES))
        if payload is None:
            fields.refuse("payload", "expected base64")
        listed = fields.items("signatures", MAX_SIGNATURES, lambda each: isinstance(each, dict), "signatures")
    return Envelope(payload, kind, tuple(_signature(i, each) for i, each in enumerate(listed)))


def from_bytes(data: bytes | str, types: Sequence[str] = TYPES) -> Envelope:
    """The Envelope of a JSON text; see `from_object`."""
    return from_object(strict_json.loads(data), types)


def _signature(index: int, value: Any) -> Signature:
    fields = Fields(value, f"envelope.signatures[{index}].")
    made = Signature(fields.text("keyid", 128) if "keyid" in fields else "", fields.base64("sig", SIGNATURE_BYTES))
    fields.finish()
    return made


def pae(kind: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of a type and a payload."""
    name = kind.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)


def check_type(envelope: Envelope, kind: str) -> None:
    """ReceiptError for an envelope of another type."""
    if envelope.type != kind:
        raise ReceiptError(f"expected {kind}, got {envelope.type}")
