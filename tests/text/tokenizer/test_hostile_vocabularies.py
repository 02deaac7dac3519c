"""Damaged and lying tekken.json and tokenizer.model files: each is refused with an error that names what is wrong."""

import base64
import json
import random
import struct

import pytest

from lockstep.text.tokenizer import sentencepiece
from lockstep.text.tokenizer.protobuf import Message
from lockstep.text.tokenizer.tokenizer import load_tokenizer
from tests.text.tokenizer import made

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2


def varint(number):
    number &= (1 << 64) - 1
    head = b""
    while number > 127:
        head, number = head + bytes([number & 127 | 128]), number >> 7
    return head + bytes([number])


def field(number, value):
    """A field of a message, encoded by the type of its value."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def message(*fields):
    return b"".join(field(number, value) for number, value in fields)


def piece(text, score=0.0, type=NORMAL):
    return field(1, message((1, text), (2, score), (3, type)))


GOOD = [piece("<unk>", type=UNKNOWN), piece("<s>", type=CONTROL), piece("a", -1.0), piece("b", -2.0), piece("ab", -0.5)]
SPEC = field(2, message((3, BPE))) + field(3, message((1, "identity"), (3, False), (4, False)))


def model(*more, pieces=GOOD, spec=SPEC):
    return b"".join([*pieces, *more, spec])


def refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(str(path)), caught.value


def test_a_small_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model(field(9, b"of later versions"), field(200, 7)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("abba", False) == [4, 3, 2] and tokenizer.encode("axa", False) == [2, 0, 2]
    assert tokenizer.decode([4, 3]) == "abb"


def test_every_cut_of_a_model_is_refused_or_another_model(tmp_path):
    """A cut between two fields leaves a whole message, which lacks pieces or settings."""
    raw = model()
    ends = {sum(map(len, GOOD[:count])) for count in range(len(GOOD) + 1)} | {len(raw) - len(SPEC) + 4}
    for cut in range(len(raw)):
        if cut in ends:
            continue
        with pytest.raises(ValueError, match=r"ends at byte|goes on behind the end"):
            sentencepiece.read_model(raw[:cut])


def test_random_bytes_are_refused_or_read():
    rng, raw = random.Random(3), model()
    for _ in range(2000):
        damaged = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            sentencepiece.build_tokenizer(sentencepiece.read_model(bytes(damaged))).encode("abba")
        except ValueError:
            continue


@pytest.mark.parametrize(
    "raw, match",
    [
        (b"", "0 of its 0 pieces are of type unknown, expected 1"),
        (b"\xff" * 11, "the integer at byte 0 has more than 10 bytes"),
        (b"\x0a\xff\xff\xff\xff\x7f", "field 1 ends at byte 34359738373, the message at byte 6"),
        (b"\x0b", "field 1 at byte 1 has the unknown wire type 3"),
        (model(b"\x08\x01"), "piece 5 has wire type 0, expected 2"),
        (model(field(1, message((1, 3)))), "piece 5: piece has wire type 0, expected 2"),
        (model(field(1, message((1, b"\xff")))), "piece 5: piece is not UTF-8 text"),
        (model(field(1, message((1, "c"), (1, "d")))), "piece 5: piece is there twice"),
        (model(field(2, b"")), "trainer_spec is there 2 times"),
        (model(piece("")), "piece 5 has 0 characters, expected 1 to 1024"),
        (model(piece("c" * 1025)), "piece 5 has 1025 characters, expected 1 to 1024"),
        (model(piece("c", float("nan"))), "piece 5 'c': its score is nan"),
        (model(piece("c", type=7)), "piece 5 'c': type 7 is not known"),
        (model(piece("c", type=-1)), "piece 5 'c': type -1 is not known"),
        (model(piece("c", type=BYTE)), "piece 5 'c': type 6 is not known, or not that of such a piece"),
        (model(piece("a")), "piece 'a' is there 2 times"),
        (model(piece("<x>", type=UNKNOWN)), "2 of its 6 pieces are of type unknown, expected 1"),
        (model(spec=field(2, message((3, BPE), (35, True)))), "byte_fallback without a piece for each byte: <0x00>"),
        (model(spec=field(2, message((3, 4)))), "model_type: 4, only 1 .unigram. and 2 .BPE. is not supported"),
        (model(spec=field(2, message((3, BPE), (24, True)))), "treat_whitespace_as_suffix: true is not supported"),
        (model(field(3, message((5, False))), spec=b""), "escape_whitespaces: false is not supported"),
        (model(field(3, message((1, "nfkc"), (2, b"x"))), spec=b""), "normalization: nfkc is not supported"),
        (model(field(5, message((2, b"x")))), "denormalization: of characters is not supported"),
        (model(piece("c", type=USER_DEFINED), spec=b""), "user-defined piece of a unigram model: c is not supported"),
        (model(piece("c", type=UNUSED), spec=b""), "an unused or user-defined piece of a unigram model: c"),
    ],
)
def test_a_broken_model_is_named(raw, match, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=match) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_model_of_too_many_pieces(monkeypatch):
    monkeypatch.setattr(sentencepiece, "MAX_PIECES", 4)
    with pytest.raises(ValueError, match="more than 4 pieces"):
        sentencepiece.read_model(model())


def test_pieces_that_cannot_be_used_as_sentencepiece_does_are_warned_about(tmp_path, caplog):
    more = [piece("aa", -0.5), piece("xb", -3.0), piece("__", -7.0), piece("___", -7.0), piece("_", -9.0)]
    (tmp_path / "tokenizer.model").write_bytes(model(*more))
    load_tokenizer(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "4 pieces, such as 'ab', have the scores of others: the longer is joined first, not the one to the left",
        "1 pieces, such as 'xb', have characters that are no pieces: they are not used",
    ]


def test_a_negative_integer_has_64_bits():
    assert Message(field(3, -1), "it").values({3: ("id", "int")}) == {"id": -1}
    assert Message(b"\x18" + b"\xff" * 9 + b"\x7f", "it").values({3: ("id", "int")}) == {"id": -1}


def tekken(**config):
    content = made.tekken(random.Random(1), tokens=5)
    content["config"] |= config
    return content


def changed(place, index, **entry):
    content = tekken()
    content.setdefault("special_tokens", [dict(rank=i, token_str=t) for i, t in enumerate(made.SPECIAL)])
    content[place][index] |= entry
    return content


ONE = base64.b64encode(b"z").decode()


@pytest.mark.parametrize(
    "content, match",
    [
        ({}, "config: expected an object, got None"),
        (tekken(version="v4"), "config.version 'v4' is not supported, only v1, v2, v3, v7, v11, v13, v15"),
        (tekken(version=["v3"]), "config.version .*v3.* is not supported"),
        *(
            (
                tekken(version="v15") | dict(special_tokens=[], model_settings_builder=builder),
                "model_settings_builder: rea",
            )
            for builder in (
                7,
                dict(reasoning_effort=7),
                dict(reasoning_effort=dict(values=["none"])),
                dict(reasoning_effort=dict(values=["'"], default="'")),
                dict(reasoning_effort=dict(values="none", default="none")),
                dict(reasoning_effort=dict(values=[["a"]], default=["a"])),
            )
        ),
        (tekken(pattern=""), "config.pattern: expected a text of 1 to 16384 characters, got ''"),
        (tekken(pattern="("), "it cannot be built"),
        (tekken(default_vocab_size=1 << 40), "config.default_vocab_size: expected an integer from 296 to 2097152"),
        (tekken(default_vocab_size=40), "config.default_vocab_size: expected an integer from 296 to 2097152, got 40"),
        (tekken(default_vocab_size=600), "vocab: 262 tokens, config.default_vocab_size asks for 560"),
        (tekken(default_num_special_tokens=-1), "config.default_num_special_tokens: expected an integer from 0"),
        (tekken(default_num_special_tokens=19), "special_tokens: 20 tokens, config.default_num_special_tokens is 19"),
        (tekken(version="v11"), "special_tokens: expected a list, got None"),
        (tekken() | dict(vocab={}), "vocab: expected a list, got {}"),
        (tekken() | dict(vocab=[7]), "vocab: 1 tokens, config.default_vocab_size asks for 261"),
        (changed("vocab", 258, rank=259), "vocab 258: expected an object of rank 258, got 259"),
        (changed("vocab", 258, rank=True), "vocab 258: expected an object of rank 258, got True"),
        (changed("vocab", 258, token_bytes="*"), "vocab 258: token_bytes must be 1 to 1024 bytes in base64, got '.'"),
        (changed("vocab", 258, token_bytes="A" * 4096), "vocab 258: token_bytes must be 1 to 1024 bytes in base64"),
        (changed("vocab", 258, token_bytes=None), "vocab 258: token_bytes must be 1 to 1024 bytes in base64, got None"),
        (changed("vocab", 97, token_bytes=ONE), "vocab 97: expected byte 97, as in all ranks below 256, got b'z'"),
        (changed("vocab", 258, token_bytes=ONE), "vocab: tokens 122 and 258 are both b'z'"),
        (changed("special_tokens", 3, rank=4), "special_tokens 3: expected an object of rank 3, got 4"),
        (changed("special_tokens", 3, token_str=""), "special_tokens 3: token_str must be a text of 1 to 1024"),
        (changed("special_tokens", 3, token_str="<s>"), "special_tokens: '<s>' is there twice"),
        (changed("special_tokens", 3, token_str="<SPECIAL_39>"), "special_tokens: '<SPECIAL_39>' is there twice"),
        (changed("special_tokens", 3, token_str="a"), "vocab: 'a' is a special token, too"),
    ],
)
def test_a_broken_tekken_is_named(content, match, tmp_path):
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_without_a_vocabulary(tmp_path):
    refused(tmp_path, "has no tokenizer.json, tekken.json or tokenizer.model; without one prompts must be token ids")
