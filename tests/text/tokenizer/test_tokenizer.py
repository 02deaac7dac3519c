"""Encoding, decoding and streaming; tokenizers from folders and from GGUF metadata."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.text.tokenizer import gguf as gguf_tokenizer
from lockstep.text.tokenizer.tokenizer import Detokenizer, Tokenizer, load_tokenizer, tokenizer_from_gguf
from tests.text.vocabularies import (
    SPECIAL,
    TEXT,
    byte_fallback,
    byte_level,
    gguf_metadata,
    sentencepiece_metadata,
    write_folder,
)


def plain(backend, **fields):
    return Tokenizer(
        backend, **{"eos_ids": frozenset(), "bos_id": None, "special_tokens": {}, "chat_templates": {}, **fields}
    )


BYTE_LEVEL, BYTE_FALLBACK = plain(byte_level()), plain(byte_fallback())
KINDS = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@KINDS
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    # SentencePiece writes spaces as ▁, so a text with that character cannot come back as it was.
    assert tokenizer.decode(ids, skip_special_tokens=False) == text or "▁" in text


@KINDS
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(tokenizer, data, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    detokenizer = Detokenizer(tokenizer, skip)
    pieces = [detokenizer.push(token_id) for token_id in ids] + [detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(ids, skip)
    if tokenizer is BYTE_LEVEL:
        assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@KINDS
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_streaming_text_never_shows_half_a_character(tokenizer, text):
    detokenizer, shown = Detokenizer(tokenizer, skip_special_tokens=False), ""
    ids = tokenizer.encode(text)
    for token_id in ids:
        shown += detokenizer.push(token_id)
        assert "\ufffd" not in shown or "\ufffd" in text
        assert text.startswith(shown) or "▁" in text
    assert detokenizer.finish() == ""
    assert shown == tokenizer.backend.decode(ids, skip_special_tokens=False)


def test_an_emoji_appears_with_its_last_byte():
    ids = [BYTE_FALLBACK.backend.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    detokenizer = Detokenizer(BYTE_FALLBACK)
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "🙂"]
    broken = Detokenizer(BYTE_FALLBACK)
    assert [broken.push(token_id) for token_id in ids[:3]] + [broken.finish()] == ["", "", "", "\ufffd"]
    mended = Detokenizer(BYTE_FALLBACK)
    assert mended.push(ids[0]) == "" and mended.push(BYTE_FALLBACK.backend.token_to_id("t")) == "\ufffdt"


def test_only_one_space_is_dropped_from_the_start():
    assert BYTE_FALLBACK.decode(BYTE_FALLBACK.encode("  the cat")) == "  the cat"
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("  the cat")) == "  the cat"


def test_metaspace_decoder_drops_the_first_mark():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"▁a": 0, "▁b": 1, "c": 2}, []))
    backend.decoder = tokenizers.decoders.Metaspace("▁", "always")
    for ids in ([0, 1, 2], [2, 0], [1], []):
        assert plain(backend).decode(ids) == backend.decode(ids)


def test_special_tokens():
    ids = BYTE_LEVEL.encode("a<|end|>b<tool call>")
    assert BYTE_LEVEL.special_ids == {BYTE_LEVEL.backend.token_to_id(token) for token in SPECIAL}
    assert BYTE_LEVEL.decode(ids) == "ab<tool call>"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "a<|end|>b<tool call>"


@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "\udc00\ud800 x"])
def test_lone_surrogates_are_refused(text):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D"):
        BYTE_LEVEL.encode(text)


def test_ids_that_cannot_be():
    with pytest.raises(ValueError, match="got -1"):
        BYTE_LEVEL.decode([-1])
    assert BYTE_LEVEL.decode([10_000_000]) == ""


def test_decoders_that_cannot_stream_are_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    with pytest.raises(ValueError, match="no decoder"):
        plain(backend).decode([0])
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match=r"WordPiece.* is not supported"):
        plain(backend).decode([0])


def test_streaming_keeps_no_text():
    """The cost of a token does not depend on the tokens before: at most 3 bytes of them are kept."""
    detokenizer = Detokenizer(BYTE_LEVEL)
    for token_id in range(BYTE_LEVEL.vocab_size):
        detokenizer.push(token_id)
        kept = {name: value for name, value in vars(detokenizer).items() if isinstance(value, (str, bytes, list, dict))}
        assert not kept and len(detokenizer.utf8.getstate()[0]) <= 3


def test_a_folder(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|begin|>", "chat_template": template}
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level(), **config))
    end, begin = (tokenizer.backend.token_to_id(token) for token in SPECIAL)
    assert tokenizer.eos_ids == {end} and tokenizer.bos_id == begin and tokenizer.has_chat_template
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi<|end|>"
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}])[-1] == end
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(tmp_path).eos_ids == {end, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert load_tokenizer(tmp_path).eos_ids == {end, 7, 8, 9}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: key 'eos_token_id': expected token ids, got 'x'"):
        load_tokenizer(tmp_path)


def test_where_the_chat_template_comes_from(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    folder = write_folder(tmp_path, byte_level())
    with pytest.raises(ValueError, match="this model has no chat template"):
        load_tokenizer(folder).render_chat(messages)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level(), chat_template=named))
    assert tokenizer.render_chat(messages) == "plain" and tokenizer.render_chat(messages, tools=[]) == "tools"
    (folder / "chat_template.jinja").write_text("own file")
    assert load_tokenizer(folder).render_chat(messages, tools=[]) == "own file"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8 text"):
        load_tokenizer(folder)


def test_settings_of_training_do_not_cut_prompts(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    ids = load_tokenizer(write_folder(tmp_path, backend)).encode(TEXT[0])
    assert BYTE_LEVEL.decode(ids) == TEXT[0]


def test_tokens_only_the_config_knows(tmp_path):
    size = BYTE_LEVEL.vocab_size
    added = {
        str(size): {"content": "<|new|>", "special": True},
        str(size + 1): {"content": "<think>", "special": False},
    }
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level(), added_tokens_decoder=added))
    assert tokenizer.encode("<|new|><think>") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<think>"
    taken = {str(size): {"content": "a", "special": True}}
    with pytest.raises(ValueError, match="'a' cannot have id"):
        load_tokenizer(write_folder(tmp_path, byte_level(), added_tokens_decoder=taken))


def test_added_tokens_out_of_range_are_ignored(tmp_path, caplog):
    gap = {str(BYTE_LEVEL.vocab_size + 5): {"content": "<|new|>", "special": True}}
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level(), added_tokens_decoder=gap))
    assert tokenizer.vocab_size == BYTE_LEVEL.vocab_size and "'<|new|>' has id" in caplog.text


@pytest.mark.parametrize("entries", [[], {"x": {"content": "a"}}, {"1": "a"}, {"1": {}}, {"1": {"content": 3}}])
def test_broken_added_tokens(entries, tmp_path):
    with pytest.raises(ValueError, match="added_tokens_decoder must map"):
        load_tokenizer(write_folder(tmp_path, byte_level(), added_tokens_decoder=entries))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_broken_tokenizer_files(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, tekken\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)


PATTERNS = {
    "gpt-2": None,
    "llama-bpe": gguf_tokenizer.LLAMA3,
    "qwen2": gguf_tokenizer.QWEN2,
    "qwen35": gguf_tokenizer.QWEN35,
    "gpt-4o": gguf_tokenizer.O200K,
}


@pytest.mark.parametrize("pre", PATTERNS)
@settings(max_examples=60, deadline=None)
@given(text=texts | st.sampled_from(TEXT))
def test_gguf_metadata_gives_the_same_tokens(pre, text):
    backend, tokenizer = BACKENDS[pre]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)


def both(pre, pattern):
    backend = byte_level(pattern, nfc=pre.startswith("qwen"))
    return backend, tokenizer_from_gguf(gguf_metadata(backend, pre))


BACKENDS = {pre: both(pre, pattern) for pre, pattern in PATTERNS.items()}

WORDS = {
    "gpt-2": ["It", "'s", " 12345", " I", "'", "M", " x", "\n\n", " y", "  "],
    "llama-bpe": ["It", "'s", " ", "123", "45", " I", "'M", " x", "\n\n", " y", "  "],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " I", "'M", " x", "\n\n", " y", "  "],
    "qwen35": ["It", "'s", " ", "1", "2", "3", "4", "5", " I", "'M", " x", "\n\n", " y", "  "],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", "5", " I", "'", "M", " x", "\n\n", " y", "  "],
    "tekken": ["It", "'s", " ", "1", "2", "3", "4", "5", " I", "'M", " x", "\n\n", " y", "  "],
    "gpt-4o": ["It's", " ", "123", "45", " I'M", " x", "\n\n", " y", "  "],
}


@pytest.mark.parametrize("pre", WORDS)
def test_words_of_each_pre_tokenizer(pre):
    text = "It's 12345 I'M x\n\n y  "
    tokenizer = tokenizer_from_gguf(gguf_metadata(byte_level(), pre))
    spans = [span for _, span in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[begin:end] for begin, end in spans] == WORDS[pre]


def test_marks_stay_with_their_letters_in_qwen35():
    word = "हिन्दी"
    words = {}
    for pre in ("qwen2", "qwen35"):
        tokenizer = tokenizer_from_gguf(gguf_metadata(byte_level(), pre))
        words[pre] = len(tokenizer.backend.pre_tokenizer.pre_tokenize_str(word))
    assert words["qwen35"] == 1 < words["qwen2"]


def test_beginning_and_end_tokens_of_gguf():
    backend = byte_level()
    end, begin = (backend.token_to_id(token) for token in SPECIAL)
    ids = {"bos_token_id": begin, "eos_token_id": end}
    plain_ids = tokenizer_from_gguf(gguf_metadata(backend, "qwen2", **ids)).encode("x")
    assert tokenizer_from_gguf(gguf_metadata(backend, "llama-bpe", **ids)).encode("x") == [begin, *plain_ids]
    flags = {"add_bos_token": True, "add_eos_token": True}
    both_added = tokenizer_from_gguf(gguf_metadata(backend, "qwen2", **ids, **flags))
    assert both_added.encode("x") == [begin, *plain_ids, end]
    assert both_added.encode("x", add_special_tokens=False) == plain_ids
    never = tokenizer_from_gguf(gguf_metadata(backend, "llama-bpe", **ids, add_bos_token=False))
    assert never.encode("x") == plain_ids and never.bos_id == begin and never.eos_ids == {end}


def test_tokens_known_to_end_a_turn_do_so():
    metadata = gguf_metadata(byte_level(), "qwen2", eot_token_id=5)
    tokenizer = tokenizer_from_gguf({**metadata, "tokenizer.chat_template": "hello"})
    assert tokenizer.eos_ids == {5, tokenizer.backend.token_to_id("<|end|>")}
    assert tokenizer.render_chat([]) == "hello"


def test_unused_tokens_are_no_tokens():
    metadata = gguf_metadata(byte_level(), "qwen2")
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"].append("[PAD]")
    metadata["tokenizer.ggml.token_type"].append(5)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.vocab_size == size and tokenizer.decode([size]) == ""


def naive_sentencepiece(text, metadata):
    """Merge the best scored neighbours, leftmost first, until none are left: SentencePiece's own rule."""
    index = {token: at for at, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores, types = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(at, index.get(left + right)) for at, (left, right) in enumerate(itertools.pairwise(pieces))]
        pairs = [(scores[token], -at) for at, token in pairs if token is not None and types[token] == 1]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    as_bytes = [[index[f"<0x{byte:02X}>"] for byte in piece.encode()] for piece in pieces]
    return [
        token
        for piece, raw in zip(pieces, as_bytes, strict=True)
        for token in ([index[piece]] if piece in index else raw)
    ]


SENTENCEPIECE = sentencepiece_metadata(byte_fallback())


@settings(max_examples=100, deadline=None)
@given(text=st.text("theca sonmdr,é🙂\n", max_size=30))
def test_sentencepiece_from_gguf(text):
    tokenizer = tokenizer_from_gguf(SENTENCEPIECE)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == naive_sentencepiece(text, SENTENCEPIECE)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [1, *ids]


@pytest.mark.parametrize("scores, words", [((-2.0, -1.0), ["a", "bc"]), ((-1.0, -2.0), ["ab", "c"])])
def test_the_better_score_merges_first(scores, words):
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -7.0, -8.0, -9.0, *scores],
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert tokenizer_from_gguf(metadata).encode("abc") == [tokens.index(word) for word in words]


def test_sentencepiece_without_the_space_prefix():
    tokenizer = tokenizer_from_gguf(
        sentencepiece_metadata(byte_fallback(), add_space_prefix=False, add_bos_token=False)
    )
    assert tokenizer.decode(tokenizer.encode(" the cat")) == " the cat"
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "no_vocab"}, "the file has no tokenizer"),
        ({"model": None}, "the file has no tokenizer"),
        ({"model": "t5"}, "tokenizer.ggml.model 't5' is not supported, only gpt2, llama, gemma4"),
        ({"tokens": []}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokens": ["a"] * ((1 << 21) + 1)}, "tokenizer.ggml.tokens has 2097153 entries, at most 2097152"),
        ({"tokens": ["a", "b" * 1025]}, "tokenizer.ggml.tokens has a token of 1025 characters, at most 1024"),
        ({"merges": ["a b"] * ((1 << 22) + 1)}, "tokenizer.ggml.merges has 4194305 entries, at most 4194304"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["no-space"]}, "inconsistent|tokenizer"),
        ({"merges": ["zzzz yyyy"]}, "inconsistent"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries"),
        ({"token_type": 1}, "tokenizer.ggml.token_type is missing or empty"),
        ({"token_type": ["1"]}, "tokenizer.ggml.token_type must be an array of numbers, found '1' in it"),
        ({"model": np.array([1, 2])}, "tokenizer.ggml.model must be a string, found array"),
        ({"pre": 7}, "tokenizer.ggml.pre must be a string, found 7"),
        ({"add_bos_token": np.array([], np.int32)}, "tokenizer.ggml.add_bos_token must be a bool, found array"),
        ({"add_eos_token": "no"}, "tokenizer.ggml.add_eos_token must be a bool, found 'no'"),
        ({"eot_token_id": "x"}, "tokenizer.ggml.eot_token_id must be a token id, found 'x'"),
        ({"eos_token_ids": ["x"]}, "tokenizer.ggml.eos_token_ids must be an array of token ids"),
        ({"model": "llama", "scores": [1.0]}, "tokenizer.ggml.scores has 1 entries"),
        ({"model": "llama", "pre": np.array([1, 2])}, "tokenizer.ggml"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_gguf_tokenizers(changes, message):
    metadata = gguf_metadata(BYTE_LEVEL.backend, "qwen2") | {
        f"tokenizer.ggml.{key}": value for key, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(metadata)


def test_every_known_pre_tokenizer_builds():
    backend = byte_level()
    for pre in gguf_tokenizer.PATTERNS:
        tokenizer = tokenizer_from_gguf(gguf_metadata(backend, pre))
        for text in TEXT:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary_sizes_agree():
    assert BYTE_LEVEL.vocab_size == len(json.loads(BYTE_LEVEL.backend.to_str())["model"]["vocab"]) + 1
