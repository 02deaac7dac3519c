"""Envelopes, keys and batches."""

import dataclasses
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from lockstep.receipts import envelope as envelopes
from lockstep.receipts.batch import batch_of, has, place_of, read_batch
from lockstep.receipts.envelope import BATCH, RECEIPT, Envelope, from_bytes, from_object, pae
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.keys import PublicKey, SigningKey, create_key, load_public_key, load_signing_key

# the first test vector of RFC 8032, section 7.1
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")


@pytest.fixture
def key():
    return SigningKey(ed25519.Ed25519PrivateKey.from_private_bytes(SECRET))


def test_signatures_are_those_of_the_rfc(key):
    assert key.public.raw == PUBLIC
    assert key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555")
    assert key.sign(b"x") == key.sign(b"x")


def test_what_is_signed_is_dsse():
    # the example of the specification
    text = pae("http://example.com/HelloWorld", b"hello world")
    assert text == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_an_envelope_is_read_as_it_was_written(key):
    made = Envelope(b'{"a":1}').signed(key)
    assert from_bytes(made.to_bytes()) == made and made.is_signed_by(key.public)
    assert from_object(Envelope(b"").to_object()).signatures == ()
    other = SigningKey(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)))
    assert not made.is_signed_by(other.public) and not Envelope(b"x").is_signed_by(key.public)
    assert made.signed(other).is_signed_by(key.public)
    for changed in (dict(payload=b'{"a":2}'), dict(type=BATCH)):
        assert not dataclasses.replace(made, **changed).is_signed_by(key.public)


@pytest.mark.parametrize("changes, said", [
    (dict(payloadType="text/plain"), "envelope.payloadType: expected application/vnd.lockstep.receipt"),
    (dict(payload="a"), "envelope.payload: expected base64"),
    (dict(extra=1), "envelope.extra: expected no such field"),
    (dict(signatures=[{}] * 9), "at most 8 signatures"),
    (dict(signatures=[dict(keyid="", sig="AAAA")]), r"signatures\[0\].sig: expected base64 of 64 bytes"),
    (dict(signatures=[dict(sig="A" * 86 + "==", x=1)]), r"signatures\[0\].x: expected no such field"),
    (dict(signatures=None), "at most 8 signatures, got None"),
])  # fmt: skip
def test_envelopes_that_are_refused(changes, said):
    with pytest.raises(ReceiptError, match=said):
        from_object(Envelope(b"x").to_object() | changes)


def test_only_the_asked_type_is_read():
    with pytest.raises(ReceiptError, match="payloadType"):
        from_bytes(Envelope(b"x", BATCH).to_bytes(), [RECEIPT])


def test_keys_in_files(tmp_path, key):
    path = tmp_path / "key"
    made = create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_signing_key(path).public.id == made.public.id == load_public_key(f"{path}.pub").id
    assert load_public_key(made.public.pem).raw == made.public.raw and len(made.public.id) == 16
    assert made.public.id != create_key(tmp_path / "other").public.id != key.public.id
    with pytest.raises(ReceiptError, match="expected a new file for the key"):
        create_key(path)
    (tmp_path / "third.pub").write_text("kept")
    with pytest.raises(ReceiptError, match="expected a new file"):
        create_key(tmp_path / "third")
    assert not (tmp_path / "third").exists()
    with pytest.raises(ReceiptError, match="the key cannot be written: No such file"):
        create_key(tmp_path / "none" / "key")


def test_keys_that_are_refused(tmp_path, key):
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    strange = ec.generate_private_key(ec.SECP256R1())
    files = {
        "locked": key.key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret")),
        "strange": strange.private_bytes(pem, pkcs8, serialization.NoEncryption()),
        "text": b"no key",
    }
    said = {"locked": "got one with a password", "strange": "another kind of key", "text": "got none", "no": "read"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name, words in said.items():
        with pytest.raises(ReceiptError, match=words):
            load_signing_key(tmp_path / name)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "pub").write_bytes(strange.public_key().public_bytes(pem, spki))
    for name, words in {"pub": "another kind of key", "text": "public Ed25519 key", "no": "cannot be read"}.items():
        with pytest.raises(ReceiptError, match=words):
            load_public_key(tmp_path / name)


def test_a_batch_binds_receipts_in_their_order(key):
    receipts = [Envelope(b'{"n":%d}' % number) for number in range(7)]
    batch = batch_of(receipts)
    signed = Envelope(batch.to_bytes(), BATCH).signed(key)
    assert read_batch(from_bytes(signed.to_bytes())) == batch and signed.is_signed_by(PublicKey(key.public.key))
    assert batch_of([each.signed(key) for each in receipts]) == batch  # own signatures do not matter
    for changed in (receipts[::-1], receipts[:-1], [*receipts, receipts[0]], receipts[1:] + receipts[:1]):
        assert batch_of(changed).root != batch.root
    for number, receipt in enumerate(receipts):
        place = place_of(receipts, number)
        assert has(batch, receipt, place)
        assert not has(batch, receipts[number - 1], place)
    with pytest.raises(ReceiptError, match="one receipt or more"):
        batch_of([])
    with pytest.raises(ReceiptError, match=r"expected application/vnd\.lockstep\.receipt.json"):
        batch_of([signed])


@pytest.mark.parametrize("payload, said", [
    (b'{"version":2,"answers":1,"root":"%s"}', "batch.version: expected 1, got 2"),
    (b'{"version":1,"answers":0,"root":"%s"}', "batch.answers"),
    (b'{"version":1,"answers":1}', "batch.root: expected, but missing"),
    (b'{"version":1,"answers":1,"root":"%s","more":1}', "batch.more"),
])  # fmt: skip
def test_batches_that_are_refused(payload, said):
    with pytest.raises(ReceiptError, match=said):
        read_batch(Envelope(payload.replace(b"%s", b"0" * 64), BATCH))
    with pytest.raises(ReceiptError, match=r"expected application/vnd\.lockstep\.receipt-batch"):
        read_batch(Envelope(payload))


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ReceiptError, match="need the package cryptography: pip install cryptography"):
        load_signing_key("key")
    assert envelopes.from_bytes(Envelope(b"x").to_bytes()).payload == b"x"  # unsigned receipts need no package


def test_a_key_is_made_whole_or_not_at_all(tmp_path):
    (tmp_path / "key.pub").symlink_to(tmp_path / "none" / "such")
    with pytest.raises(ReceiptError, match="one of them exists"):
        create_key(tmp_path / "key")
    assert not (tmp_path / "key").exists()
    for use in (load_public_key, load_signing_key, create_key):
        with pytest.raises(ReceiptError, match=r"null byte|NUL"):
            use("a\0b")
