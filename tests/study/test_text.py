"""Texts: files are checked by their hash; windows; a calibration text may not share a passage with the evaluation's."""

import hashlib
from pathlib import Path

import pytest

from lockstep.study.scoring.text import (
    NO_TARGET,
    Text,
    Window,
    check_disjoint,
    read_text,
    shared_tokens,
    windows_hash,
    windows_of,
)
from lockstep.text.tokenizer.tokenizer import load_tokenizer
from lockstep.weights.hub import resolve_model

SAID = "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n" * 3


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model(None))


def text(ids, first=None):
    return Text(Path("a.txt"), "", 0, ids, first)


def test_a_text_is_the_one_that_was_meant(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(SAID)
    digest = hashlib.sha256(SAID.encode()).hexdigest()
    read = read_text(path, tokenizer, digest.upper())
    assert (read.sha256, read.num_bytes, read.ids) == (digest, len(SAID), tokenizer.encode(SAID))
    other = "0" * 64
    with pytest.raises(ValueError, match=rf"a.txt: its SHA-256 is {digest}, expected {other}"):
        read_text(path, tokenizer, other)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "the text is empty"), (b"ab\xff", "byte 2 is not UTF-8, expected a text file")]
)
def test_what_is_no_text(content, said, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt: {said}"):
        read_text(tmp_path / "a.txt", tokenizer)


def test_windows_follow_each_other_and_each_row_has_the_next_token():
    assert windows_of(text(range(10)), 3) == [
        Window((0, 1, 2), (1, 2, 3)),
        Window((3, 4, 5), (4, 5, 6)),
        Window((6, 7, 8), (7, 8, 9)),
    ]
    assert len(windows_of(text(range(9)), 3)) == 2  # nothing follows the last token


def test_some_windows_are_evenly_spread():
    every = windows_of(text(range(101)), 10)
    assert windows_of(text(range(101)), 10, 4) == [every[i] for i in (0, 2, 5, 7)]
    assert windows_of(text(range(101)), 10, 10) == every


def test_windows_like_those_of_llama_cpp():
    made = windows_of(text(range(20, 31), first=1), 5, like="llama.cpp")
    none = NO_TARGET
    assert made == [
        Window((1, 21, 22, 23, 24), (none, none, 23, 24, none)),
        Window((1, 26, 27, 28, 29), (none, none, 28, 29, none)),
    ]
    assert windows_of(text(range(20, 31)), 5, 1, "llama.cpp")[0].ids == (20, 21, 22, 23, 24)


@pytest.mark.parametrize(
    ("length", "count", "said"),
    [
        (1, None, "windows of 1 tokens, expected at least 2"),
        (10, None, "a.txt: 10 tokens, expected more than 10 for one window of 10"),
        (3, 4, "a.txt: 4 windows of 3 tokens wanted, it has 3"),
        (3, 0, "a.txt: 0 windows of 3 tokens wanted, it has 3"),
    ],
)
def test_windows_that_a_text_does_not_have(length, count, said):
    with pytest.raises(ValueError, match=said):
        windows_of(text(range(10)), length, count)


def test_other_windows_have_another_hash():
    made = windows_of(text(range(10)), 3)
    hashes = {windows_hash(made), windows_hash(made[:2]), windows_hash(windows_of(text(range(10), 0), 3, None, "x"))}
    assert len(hashes) == 3 and windows_hash(list(made)) in hashes


def test_shared_tokens_are_found_where_they_are():
    a, b = list(range(1000)), list(range(2000, 3000))
    assert shared_tokens(a, b) is None
    assert shared_tokens(a, b[:500] + a[300:331] + b[500:]) is None
    assert shared_tokens(a, b[:500] + a[300:332] + b[500:]) == (300, 500)
    assert shared_tokens(a, a[5:9]) == (5, 0)  # all of a short text


def test_a_calibration_text_in_the_evaluation_text(tmp_path, tokenizer):
    for name, said in (("a.txt", SAID), ("b.txt", "# another text\n" * 9 + SAID)):
        (tmp_path / name).write_text(said)
    a, b = (read_text(tmp_path / name, tokenizer) for name in ("a.txt", "b.txt"))
    said = r"a.txt: its tokens 24 to 55 are tokens \d+ to \d+ of the evaluation text .*b.txt, '.ndef read_lines"
    with pytest.raises(ValueError, match=said.replace(".n", r"\\n")):
        check_disjoint(a, b, tokenizer)
    texts = Path(__file__).parents[2] / "studies" / "texts"
    check_disjoint(*(read_text(texts / f"{name}.txt", tokenizer) for name in ("calibration", "evaluation")), tokenizer)


def test_windows_in_which_nothing_would_be_scored(tmp_path):
    text = Text(tmp_path / "t", "", 0, tuple(range(40)))
    with pytest.raises(ValueError, match="windows of 2 tokens, expected at least 3"):
        windows_of(text, 2, like="llama.cpp")
    assert sum(target != NO_TARGET for target in windows_of(text, 3, like="llama.cpp")[0].targets) == 1
