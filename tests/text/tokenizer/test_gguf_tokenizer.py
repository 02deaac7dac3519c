"""Marks, end tokens, templates and invalid ids in the metadata of GGUF files of all kinds of conversions."""

import numpy as np
import pytest

from lockstep.text.tokenizer.tokenizer import find_tokenizer, has_tokenizer, tokenizer_from_gguf
from tests.text.vocabularies import byte_level, gguf_metadata, write_folder

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
HELLO = [dict(role="user", content="hi")]


def metadata(marks=(), pre="qwen2", **extra):
    """Metadata of a vocabulary to which these {token: type} are added."""
    made = gguf_metadata(byte_level(), pre, **extra)
    for token, kind in dict(marks).items():
        made["tokenizer.ggml.tokens"].append(token)
        made["tokenizer.ggml.token_type"].append(kind)
    return made


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, CONTROL])
@pytest.mark.parametrize("mark", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>"])
def test_end_marks_of_any_type_are_ends_and_control_tokens(mark, kind):
    tokenizer = tokenizer_from_gguf(metadata({mark: kind, "<|im_start|>": kind}))
    end, start = (tokenizer.backend.token_to_id(token) for token in (mark, "<|im_start|>"))
    assert end in tokenizer.eos_ids and start not in tokenizer.eos_ids
    assert {end, start} <= tokenizer.special_ids and tokenizer.decode([start, end]) == ""
    assert tokenizer.encode(f"a<|im_start|>b{mark}")[1::2] == [start, end]


@pytest.mark.parametrize("kind, ends", [(NORMAL, False), (USER_DEFINED, False), (CONTROL, True)])
def test_words_of_other_languages_end_answers_only_as_control_tokens(kind, ends):
    """</s> ends struck-out text in HTML, and is a plain word of Qwen's vocabulary."""
    tokenizer = tokenizer_from_gguf(metadata({"</s>": kind}))
    end = tokenizer.backend.token_to_id("</s>")
    assert (end in tokenizer.eos_ids) == (end in tokenizer.special_ids) == ends


def test_named_marks_are_control_tokens_and_named_words_are_not():
    made = metadata({"</s>": NORMAL, "<s>": NORMAL})
    size = len(made["tokenizer.ggml.tokens"])
    comma = made["tokenizer.ggml.tokens"].index(",")
    tokenizer = tokenizer_from_gguf(
        made
        | {
            "tokenizer.ggml.eos_token_id": size - 2,
            "tokenizer.ggml.bos_token_id": size - 1,
            "tokenizer.ggml.eom_token_id": comma,
        }
    )
    assert {size - 2, size - 1} <= tokenizer.special_ids and comma not in tokenizer.special_ids
    assert tokenizer.eos_ids >= {size - 2, comma} and tokenizer.encode("</s>,") == [size - 2, comma]


def test_a_list_of_ends(caplog):
    made = metadata(eos_token_ids=np.array([3, 5, 1 << 30, -1], np.int32))
    ends, num_tokens = tokenizer_from_gguf(made).eos_ids, len(made["tokenizer.ggml.tokens"])
    assert {3, 5} <= ends and not ends & {1 << 30, -1}
    assert [record.getMessage() for record in caplog.records] == [
        f"tokenizer.ggml.eos_token_ids {i} is none of {num_tokens} token ids: it is ignored" for i in (-1, 1 << 30)
    ]
    assert tokenizer_from_gguf(metadata(eos_token_ids=np.array([], np.int32))).eos_ids


@pytest.mark.parametrize("strange", [0xFFFFFFFF, -1, 1 << 20])
def test_ids_that_no_token_has_are_ignored(strange, caplog):
    tokenizer = tokenizer_from_gguf(
        metadata(bos_token_id=strange, eos_token_id=strange, unknown_token_id=strange, add_bos_token=True)
    )
    assert tokenizer.bos_id is None and strange not in tokenizer.eos_ids
    assert "bos_token" not in tokenizer.special_tokens and tokenizer.encode("a") == tokenizer.encode("a", False)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3 and f"tokenizer.ggml.bos_token_id {strange} is none of" in warned[0]


def test_a_merge_of_one_token_is_named():
    made = metadata()
    made["tokenizer.ggml.merges"][3] = "alone"
    with pytest.raises(ValueError, match=r"^tokenizer.ggml.merges: expected two tokens .*, got 'alone'$"):
        tokenizer_from_gguf(made)


def test_named_templates():
    tokenizer = tokenizer_from_gguf(
        metadata()
        | {
            "tokenizer.chat_template": "plain",
            "tokenizer.chat_templates": ["tool_use", "rag"],
            "tokenizer.chat_template.tool_use": "tools",
            "tokenizer.chat_template.rag": " \n",
        }
    )
    assert tokenizer.chat_templates == dict(default="plain", tool_use="tools")
    assert tokenizer.render_chat(HELLO) == "plain" and tokenizer.render_chat(HELLO, tools=[]) == "tools"


def test_an_empty_template_is_none():
    assert not tokenizer_from_gguf(metadata() | {"tokenizer.chat_template": ""}).has_chat_template


def test_an_unknown_pre_tokenizer_still_reads_answers():
    tokenizer = tokenizer_from_gguf(metadata(pre="kimi-k2") | {"tokenizer.chat_template": "x"})
    known = tokenizer_from_gguf(metadata())
    ids = known.encode("def f(x):\n    return 1")
    assert tokenizer.decode(ids) == "def f(x):\n    return 1"
    for text in ("a", ""):
        with pytest.raises(ValueError, match=r"\.pre 'kimi-k2' is not supported, only default.*token ids"):
            tokenizer.encode(text)
    assert not tokenizer.has_chat_template


@pytest.mark.parametrize("model", ["none", "no_vocab", "t5", None])
def test_files_without_a_tokenizer_we_build(model, tmp_path):
    made = {} if model is None else {"tokenizer.ggml.model": model}
    path = tmp_path / "m.gguf"
    assert not has_tokenizer(path, made)
    with pytest.raises(ValueError, match="token ids"):
        find_tokenizer(path, made)
    write_folder(tmp_path, byte_level())
    assert has_tokenizer(path, made) and find_tokenizer(path, made).encode("a")


def test_the_tokenizer_of_the_file_itself_wins(tmp_path):
    write_folder(tmp_path, byte_level(), eos_token="a")
    assert find_tokenizer(tmp_path / "m.gguf", metadata(eot_token_id=7)).eos_ids >= {7}


def test_gemma4_lists_its_merges_of_text_whose_spaces_are_marks():
    """Bytes stand for characters without a token; there is no space before the text, and BOS is added."""
    pieces = ["▁", "a", "b", "n", "▁a", "ab", "▁ab", "\n", "\n\n"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "<turn|>"]
    kinds = [3, 3, 3, 2, *[6] * 256, *[1] * len(pieces), 4]
    merges = ["▁ a", "a b", "▁a b", "\n \n"]
    given = dict(model="gemma4", tokens=tokens, token_type=np.array(kinds), merges=merges, scores=np.zeros(len(tokens)))
    ids = dict(bos_token_id=2, eos_token_id=1, unknown_token_id=3, eot_token_id=len(tokens) - 1)
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in (given | ids).items()})
    for text, expected in (
        ("ab ab", ["ab", "▁ab"]),
        ("b\n\n\nn", ["b", "\n\n", "\n", "n"]),
        ("é", ["<0xC3>", "<0xA9>"]),
    ):
        found = tokenizer.encode(text)
        assert found == [2, *map(tokens.index, expected)] and tokenizer.decode(found[1:]) == text
    assert tokenizer.encode("a<turn|>")[1:] == [tokens.index("a"), len(tokens) - 1]
    assert {1, len(tokens) - 1} <= tokenizer.eos_ids
