"""Records vocabularies with what sentencepiece and mistral-common make of texts and conversations, for `make test`.

python -m tests.text.tokenizer.record_vocabularies     # sentencepiece and mistral-common needed
"""

import base64
import json
import random
import tempfile
import zlib
from pathlib import Path

from tests.text.tokenizer import made, reference

RECORDED = Path(__file__).with_name("vocabularies.json")
NUM_TEXTS = 12


def record() -> dict:
    """{file's name: {"file": base64 of it compressed, "texts": ..., "ids": ..., "decoded": ..., "chats": ids}}."""
    rng, cases = random.Random(19), {}
    for name in made.TRAINED:
        raw = made.trained(rng, name)
        cases[f"tokenizer.model.{name}"] = _case(rng, raw, reference.SentencePiece(raw))
        if name in ("v1", "v3", "v7"):
            cases[f"tokenizer.model.{name}"]["chats"] = _chats(name, f"tokenizer.model.{name}", raw)
    for version in ("v3", "v7", "v11", "v13", "v15"):
        special = made.SPECIAL + made.LATER if version in ("v11", "v13", "v15") else None
        special = special + made.OF_V15 if special and version == "v15" else special
        raw = made.tekken_bytes(made.tekken(rng, version, special=special))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tekken.json"
            path.write_bytes(raw)
            cases[f"tekken.json {version}"] = _case(rng, raw, reference.Tekken(path))
        cases[f"tekken.json {version}"]["chats"] = _chats(version, "tekken.json", raw)
    return cases


def _case(rng: random.Random, raw: bytes, tokenizer: reference.SentencePiece | reference.Tekken) -> dict:
    texts = ["", " ", *(made.text(rng, rng.randrange(1, 12)) for _ in range(NUM_TEXTS))]
    ids = [tokenizer.encode(text) for text in texts]
    return dict(
        file=base64.b64encode(zlib.compress(raw, 9)).decode(),
        texts=texts,
        ids=ids,
        decoded=[tokenizer.decode(each) for each in ids],
    )


def _chats(version: str, name: str, raw: bytes) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        return [reference.chat_ids(path, *conversation) for conversation in made.conversations(version)]


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(record(), ensure_ascii=False, separators=(",", ":")) + "\n")
