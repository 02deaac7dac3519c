"""Tokenizers whose normalizers would fill the memory are refused before the tokenizers library sees them."""

import base64
import json

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lockstep.text.tokenizer.folder import read_backend
from tests.text.vocabularies import byte_fallback, byte_level

REPLACE = dict(type="Replace", pattern=dict(String="a"), content="a" * 8)

UNTYPED = dict(pattern=dict(String="a"), content="a" * 8)  # which the library takes for the same


def written(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    return path


def file_of(tmp_path, **parts):
    backend = json.loads(Backend(models.BPE()).to_str())
    return written(tmp_path, json.dumps({**backend, **parts}))


def chained(*steps):
    return dict(type="Sequence", normalizers=list(steps))


def charsmap(text):
    table = b"\0" * 8
    return base64.b64encode(len(table).to_bytes(4, "little") + table + b"a\0" + text + b"\0").decode()


@pytest.mark.parametrize(
    "normalizer, says",
    [
        (chained(*[REPLACE] * 12), "times as long, at most 64"),
        (chained(chained(REPLACE), chained(chained(REPLACE, REPLACE))), "512 times as long"),
        (dict(normalizers=[UNTYPED] * 12), "512 times as long"),
        (REPLACE | dict(content="b" * 65), "65 times as long"),
        (REPLACE | dict(pattern=dict(Regex=""), content="b" * 64), "65 times as long"),
        (REPLACE | dict(pattern=dict(String=""), content="b" * 64), "65 times as long"),
        (chained(*[dict(type="ByteLevel")] * 7), "128 times as long"),
        (
            chained(*[dict(type="Lowercase")] * 65, dict(type="Prepend", prepend="a")),
            "66 normalizers and pre-tokenizers",
        ),
        (dict(type="Prepend", prepend="a" * 2000), "prepends 2000 characters"),
        (dict(type="Precompiled", precompiled_charsmap=charsmap(b"x" * 300)), "100 times as long"),
        (dict(type="Precompiled", precompiled_charsmap="?"), "not base64"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_normalizers_that_grow_without_bound_are_refused(tmp_path, normalizer, says):
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{says}"):
        read_backend(file_of(tmp_path, normalizer=normalizer))


def test_chains_are_found_in_pre_tokenizers_behind_escapes_and_given_twice(tmp_path):
    levels = dict(
        type="Sequence",
        pretokenizers=[dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)] * 9,
    )
    with pytest.raises(ValueError, match="times as long"):
        read_backend(file_of(tmp_path, pre_tokenizer=levels))
    text = file_of(tmp_path, normalizer=chained(*[REPLACE] * 12)).read_text()
    with pytest.raises(ValueError, match="times as long"):
        read_backend(
            written(
                tmp_path, text.replace('"Replace"', r'"\u0052eplace"').replace('"normalizer"', r'"\u006eormalizer"')
            )
        )
    moved = text[:-1] + ', "normalizer": ' + json.dumps(chained(*[REPLACE] * 12)) + "}"
    with pytest.raises(ValueError, match="times as long"):
        read_backend(written(tmp_path, moved.replace(', "normalizer"', ', "other"', 1)))
    twice = '{"type": "Replace", "pattern": {"String": "a"}, "content": "a", "content": "aaaaaaaa"}'
    with pytest.raises(ValueError, match="an object has a name twice, of type, pattern, content"):
        read_backend(written(tmp_path, text.replace(json.dumps(chained(*[REPLACE] * 12)), twice)))


@pytest.mark.parametrize(
    "normalizer",
    [
        5,
        [],
        dict(normalizers=5),
        dict(type="Replace", pattern=5, content=5),
        dict(type="Sequence", normalizers=[5, None, []]),
        dict(prepend=5),
    ],
    ids=str,
)
def test_steps_that_are_none_are_clear_errors(tmp_path, normalizer):
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        read_backend(file_of(tmp_path, normalizer=normalizer))


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        normalizers.NFC(),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        normalizers.Sequence(
            [
                normalizers.Replace("``", '"'),
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        ),
        normalizers.BertNormalizer(),
    ],
    ids=str,
)
def test_usual_normalizers_are_read(tmp_path, normalizer):
    backend = byte_level()
    if normalizer is not None:
        backend.normalizer = normalizer
    made = read_backend(written(tmp_path, backend.to_str()))
    assert made.encode("Ab  c").ids == backend.encode("Ab  c").ids


def test_usual_tokenizers_are_read(tmp_path):
    for backend in (byte_level(nfc=True), byte_fallback()):
        backend.pre_tokenizer = backend.pre_tokenizer or pre_tokenizers.Metaspace()
        assert read_backend(written(tmp_path, backend.to_str())).encode("the cat").ids == backend.encode("the cat").ids
