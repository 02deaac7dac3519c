"""The test vectors in docs/receipts.md are what this implementation computes."""

import dataclasses
import hashlib
import json
import pathlib
import re

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ed25519

from lockstep.engine.leaves import leaf
from lockstep.engine.request import SamplingParams, sample_seed
from lockstep.receipts.batch import batch_of, place_of
from lockstep.receipts.envelope import RECEIPT, Envelope, pae
from lockstep.receipts.fields import ids_digest, to_base64
from lockstep.receipts.identity import digest_of
from lockstep.receipts.keys import SigningKey
from lockstep.receipts.merkle import leaf_hash, root_of
from lockstep.receipts.parameters import ELSEWHERE, FLOATS, float_bits, seed_of
from lockstep.receipts.statement import commitment, packed
from lockstep.weights.content import content_hash

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "receipts.md"
IDS = [1, 70_000, 262_143]
STATE = np.array([0.5, -1.25, 3.0], np.float32)
KEY = SigningKey(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def vectors():
    """{what, as the page says it: value}."""
    leaves = [leaf(token, -0.25 * (number + 1), STATE + number) for number, token in enumerate(IDS)]
    payload = b'{"version":1}'
    return {
        "SHA-256 of the hidden state float32 [0.5, -1.25, 3]": hashlib.sha256(STATE.tobytes()).hexdigest(),
        "leaf of token 1 with log-probability -0.25 and this hidden state": leaves[0].hex(),
        "node of this leaf": leaf_hash(leaves[0]).hex(),
        "root over it and the leaves of 70000 (-0.5, hidden state + 1) and 262143 (-0.75, + 2)": root_of(
            b"".join(leaves), 40
        ).hex(),
        "root of no leaves": root_of(b"", 40).hex(),
        "ids 1, 70000, 262143 as base64": packed(IDS),
        "SHA-256 of these ids": ids_digest(IDS).hex(),
        "commitment of these ids, salt 32 bytes of 0x01": commitment(b"\1" * 32, IDS).hex(),
        'seed by the nonce "abc" and these ids': str(seed_of("abc", IDS)),
        "seed of sample 1 where the request's is 5": str(sample_seed(5, 1)),
        "bits of 0.8": float_bits(0.8),
        "tag of the first leaf": to_base64(leaf_hash(leaves[0])[:2]),
        'content of a file with the SHA-256 0, 0, ... and the tensors b and a, config {"x": 1}': content_hash(
            ["0" * 64], [["b", "a"]], {"x": 1}
        ),
        "formats of the weights b (q8_0) and a (f32)": digest_of([["a", "f32"], ["b", "q8_0"]]),
        'what is signed of the receipt with the payload `{"version":1}`': pae(RECEIPT, payload).decode(),
        "key of the secret bytes 0, 1, ... 31: keyid": KEY.public.id,
        "its signature of that receipt": KEY.sign(pae(RECEIPT, payload)).hex(),
        "the same as `sig`": to_base64(KEY.sign(pae(RECEIPT, payload))),
        "root of the batch of that receipt, twice": batch_of([Envelope(payload)] * 2).root.hex(),
        "path of the third in a batch of it, three times": place_of([Envelope(payload)] * 3, 2).path[0].hex(),
    }


def rows():
    """The lines of the page's table."""
    return [f"| {what} | `{value}` |" for what, value in vectors().items()]


def test_the_page_has_these_vectors():
    section = PAGE.read_text("utf-8").split("## Test vectors")[1].split("\n## ")[0]
    found = [line for line in section.splitlines() if re.match(r"\| (?!what \||---)", line) and "`" in line]
    assert found == rows()


def test_the_page_has_all_parameters_with_their_usual_values():
    section = PAGE.read_text("utf-8").split("### Sampling")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, form, usual = [cell.strip() for cell in line.strip("|").split("|")]
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), (form, usual))
    for each in dataclasses.fields(SamplingParams):
        if each.name not in ELSEWHERE:
            form, usual = found.pop(each.name)
            value = getattr(SamplingParams(), each.name)
            written = f'"{value}"' if each.name == "seed" else "none" if value is None else json.dumps(value)
            assert usual == written.removesuffix(".0") and (form == "bits") == (each.name in FLOATS), each.name
    assert not found
