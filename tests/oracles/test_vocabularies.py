"""Live comparison with sentencepiece and mistral-common: fresh vocabularies, texts and conversations.

Run by `make test-oracles`; the seed of a failure is in its message, LOCKSTEP_SEED repeats it.
"""

import os
import random
import secrets
from pathlib import Path

import pytest

from lockstep.text.conversation import ChatModel, Conversation
from lockstep.text.tokenizer.tokenizer import Detokenizer, load_tokenizer
from lockstep.text.tool_calls.tools import Tool, ToolUse
from tests.text.tokenizer import made

reference = pytest.importorskip(
    "tests.text.tokenizer.reference", reason="sentencepiece and mistral-common are needed", exc_type=ImportError
)
SEED = int(os.environ.get("LOCKSTEP_SEED") or secrets.randbelow(1 << 30))
NUM_TEXTS = 100


def same_tokens(tokenizer, other, rng, only_order=False):
    """only_order: of unigram models, whose float32 sums make other pieces of equal scores the better ones."""
    for _ in range(NUM_TEXTS):
        text = made.text(rng, rng.randrange(1, 25))
        ids, expected = tokenizer.encode(text, add_special_tokens=False), other.encode(text)
        assert ids == expected or (only_order and sorted(ids) == sorted(expected)), (SEED, text)
        detokenizer = Detokenizer(tokenizer)
        streamed = "".join([detokenizer.push(token) for token in ids]) + detokenizer.finish()
        if 0 not in ids and ids == expected:
            assert streamed == tokenizer.decode(ids) == other.decode(ids), (SEED, text)


@pytest.mark.parametrize("name", made.TRAINED)
def test_sentencepiece(name, tmp_path):
    rng = random.Random(f"{SEED} {name}")
    raw = made.trained(rng, name, size=rng.randrange(400, 700))
    (tmp_path / "tokenizer.model").write_bytes(raw)
    same_tokens(load_tokenizer(tmp_path), reference.SentencePiece(raw), rng, "unigram" in name)


@pytest.mark.parametrize("version", ["v3", "v13", "v15"])
def test_tekken(version, tmp_path):
    rng = random.Random(f"{SEED} {version}")
    content = made.tekken(rng, version, tokens=rng.randrange(100, 900), special=made.SPECIAL + made.LATER + made.OF_V15)
    (tmp_path / "tekken.json").write_bytes(made.tekken_bytes(content))
    same_tokens(load_tokenizer(tmp_path), reference.Tekken(tmp_path / "tekken.json"), rng)


def own_files():
    """Mistral's own vocabularies, which mistral-common has."""
    import mistral_common

    return sorted(path for path in (Path(mistral_common.__file__).parent / "data").iterdir() if path.is_file())


@pytest.mark.parametrize("number", range(7))
def test_mistrals_own(number, tmp_path):
    files = own_files()
    if number >= len(files):
        pytest.skip(f"mistral-common has {len(files)} vocabularies")
    path, rng = files[number], random.Random(f"{SEED} {number}")
    name = "tekken.json" if path.suffix == ".json" else f"tokenizer.model{path.suffix}"
    (tmp_path / name).symlink_to(path)
    (tmp_path / "params.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    other = reference.Tekken(path) if path.suffix == ".json" else reference.SentencePiece(path.read_bytes())
    same_tokens(tokenizer, other, rng)
    chat, function = ChatModel(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size), made.TOOL["function"]
    use = ToolUse((Tool(function["name"], function["description"], function["parameters"]),))
    version = "v3" if path.suffix == ".json" else path.suffix[1:].partition("m")[0]
    for messages, with_tool in made.conversations(version):
        asked = Conversation([dict(message) for message in messages], use if with_tool else ToolUse())
        assert chat.prepare(asked).ids == reference.chat_ids(path, messages, with_tool), messages
