"""Ed25519 keys (RFC 8032), which sign receipts. They need the package `cryptography`, the extra "receipts".

A signing key is a PEM file (PKCS #8) as `openssl genpkey -algorithm ed25519` makes it, its public key another (SPKI).
Ed25519 draws no random numbers: the same receipt has the same signature.
"""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.receipts.errors import ReceiptError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_KEY_BYTES = 16 << 10
MAX_KEY_CHARS = 4096  # of a public key's PEM text; it has 113
BEGIN_PUBLIC = "-----BEGIN PUBLIC KEY-----"


@dataclass(frozen=True)
class PublicKey:
    """A key that tells whether a signature is its owner's."""

    key: "Ed25519PublicKey"

    @functools.cached_property
    def raw(self) -> bytes:
        """Its 32 bytes."""
        return self.key.public_bytes_raw()

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 of its 32 bytes."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    @property
    def pem(self) -> str:
        """Its PEM text."""
        encoding = _serialization()
        return self.key.public_bytes(encoding.Encoding.PEM, encoding.PublicFormat.SubjectPublicKeyInfo).decode("ascii")

    def is_signature(self, signature: bytes, message: bytes) -> bool:
        """Whether its owner made a signature of a message."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class SigningKey:
    """A key that signs."""

    key: "Ed25519PrivateKey"

    @functools.cached_property
    def public(self) -> PublicKey:
        """Its public key."""
        return PublicKey(self.key.public_key())

    def sign(self, message: bytes) -> bytes:
        """The signature of a message, 64 bytes."""
        return self.key.sign(message)


def load_signing_key(path: str | os.PathLike[str]) -> SigningKey:
    """The key in a PEM file. ReceiptError for a file that cannot be read, or has no unencrypted Ed25519 key."""
    from_pem, kind, data = _serialization().load_pem_private_key, _ed25519().Ed25519PrivateKey, _read(path)
    try:
        key = from_pem(data, password=None)
    except (ValueError, TypeError, _unsupported()) as error:
        got = "one with a password" if isinstance(error, TypeError) else "none"
        raise ReceiptError(f"{path}: expected a PEM file with a private Ed25519 key, got {got}") from None
    if not isinstance(key, kind):
        raise ReceiptError(f"{path}: expected a private Ed25519 key, got another kind of key")
    return SigningKey(key)


def load_public_key(source: str | os.PathLike[str]) -> PublicKey:
    """The key in a PEM file, or in PEM text. ReceiptError for a file that cannot be read, or has no public Ed25519
    key."""
    if isinstance(source, str) and source.lstrip().startswith(BEGIN_PUBLIC):
        return public_key(source)
    return _public_key(_read(source), str(source))


def public_key(text: str) -> PublicKey:
    """The key in PEM text, which is never read as the name of a file. ReceiptError for any other text."""
    return _public_key(text.encode(), "key")


def _public_key(data: bytes, name: str) -> PublicKey:
    """The key in PEM text; name: where it came from, for errors."""
    from_pem = _serialization().load_pem_public_key
    try:
        key = from_pem(data)
    except (ValueError, _unsupported()):
        raise ReceiptError(f"{name}: expected a PEM file with a public Ed25519 key") from None
    if not isinstance(key, _ed25519().Ed25519PublicKey):
        raise ReceiptError(f"{name}: expected a public Ed25519 key, got another kind of key")
    return PublicKey(key)


def create_key(path: str | os.PathLike[str]) -> SigningKey:
    """Makes a new key: writes it to a file that only its owner can read, and its public key beside it, to PATH.pub.
    ReceiptError for a file that exists already or cannot be written."""
    encoding, made = _serialization(), SigningKey(_ed25519().Ed25519PrivateKey.generate())
    forms = encoding.Encoding.PEM, encoding.PrivateFormat.PKCS8, encoding.NoEncryption()
    public = Path(f"{path}.pub")
    try:
        if os.path.lexists(public):
            raise FileExistsError(public)
        _write_new(path, made.key.private_bytes(*forms), 0o600)
        try:
            _write_new(public, made.public.pem.encode("ascii"), 0o666)
        except OSError:
            os.unlink(path)
            raise
    except FileExistsError:
        raise ReceiptError(f"{path}: expected a new file for the key and its .pub, one of them exists") from None
    except (OSError, ValueError) as error:
        raise ReceiptError(f"{path}: the key cannot be written: {getattr(error, 'strerror', error)}") from None
    return made


def _write_new(path: str | os.PathLike[str], data: bytes, mode: int) -> None:
    """Writes a file that was not there. mode: before the umask."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_KEY_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ReceiptError(f"{path!s:.200}: the key cannot be read: {getattr(error, 'strerror', error)}") from None


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise ReceiptError("keys of receipts need the package cryptography: pip install cryptography") from None
    return serialization


def _ed25519() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    return ed25519


def _unsupported() -> type[Exception]:
    """What the package raises for a kind of key that it does not know."""
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm
