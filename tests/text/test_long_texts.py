"""Long texts: other threads run while they are tokenized, and those that cannot fit are refused early."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from lockstep.text.tokenizer.tokenizer import PIECE_CHARS, TooManyTokens
from tests.text.stalls import is_brief, longest_stall
from tests.text.tokenizer.test_tokenizer import BYTE_FALLBACK, BYTE_LEVEL, KINDS, plain
from tests.text.vocabularies import SPECIAL, byte_level

NFC = plain(byte_level(nfc=True))
WORDS = st.sampled_from([*SPECIAL, "<tool call>", "<s>", "<unk>", "a", "  ", "\n\n", "the cat", "ab\u0301", "日本"])
TEXTS = st.lists(WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=10), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, special=st.booleans())
def test_ids_are_those_of_the_librarys_plain_call(text, special):
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK, NFC):
        assert tokenizer.encode(text, special) == tokenizer.backend.encode(text, add_special_tokens=special).ids


@KINDS
def test_other_threads_run_while_a_long_text_is_tokenized(tokenizer):
    text = "The quick brown fox jumps over the lazy dog.\n" * 20_000
    with longest_stall() as longest:
        ids = tokenizer.encode(text)
    assert len(ids) > 100_000 and is_brief(longest[0])


@KINDS
@pytest.mark.parametrize("char", ["a", " ", "日", "\n"])
def test_a_text_that_cannot_fit_is_refused_without_tokenizing_all_of_it(tokenizer, char, monkeypatch):
    seen = []
    own = type(tokenizer).piece_ids
    monkeypatch.setattr(type(tokenizer), "piece_ids", lambda *args: seen.append(len(args[1])) or own(*args))
    text = char * 2_000_000
    with pytest.raises(TooManyTokens, match=r"2000000 characters, .* more than the 1000 tokens"):
        tokenizer.encode(text, max_tokens=1000)
    assert sum(seen) <= 8 * PIECE_CHARS


@KINDS
def test_a_text_that_may_fit_is_tokenized(tokenizer):
    text = "the cat sat on the mat " * 10_000
    ids = tokenizer.encode(text)
    assert tokenizer.encode(text, max_tokens=len(ids)) == ids


@pytest.mark.parametrize(
    "broken, says",
    [(Split(Regex("(a+)+$"), "isolated"), "retry-limit"), (None, "Missing .* token")],
    ids=["regex", "no unknown token"],
)
def test_a_tokenizer_that_fails_on_a_text_is_a_clear_error(broken, says):
    backend = Backend(WordLevel({"a": 0}, unk_token="<unk>"))
    if broken is not None:
        backend = byte_level()
        backend.pre_tokenizer = broken
    with pytest.raises(ValueError, match=f"the model's tokenizer cannot read this text .*{says}"):
        plain(backend).encode("a" * 40 + "b")
