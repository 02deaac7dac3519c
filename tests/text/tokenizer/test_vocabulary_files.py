"""tekken.json and tokenizer.model: the tokens, texts and prompts that sentencepiece and mistral-common make of them."""

import base64
import itertools
import json
import random
import zlib
from pathlib import Path

import pytest

from lockstep.text.conversation import ChatModel, Conversation
from lockstep.text.tokenizer.merges import merges_of
from lockstep.text.tokenizer.space_prefix import SpacePrefix
from lockstep.text.tokenizer.tokenizer import Detokenizer, find_tokenizer, has_tokenizer, load_tokenizer
from lockstep.text.tool_calls.tools import Tool, ToolUse
from tests.text.tokenizer import made
from tests.text.vocabularies import byte_level, words_metadata, write_folder

CASES = json.loads(Path(__file__).with_name("vocabularies.json").read_text("utf-8"))
CHATS = [name for name, case in CASES.items() if "chats" in case]


def folder_of(name, path, **files):
    """A folder with a recorded vocabulary, and other files."""
    path.mkdir(exist_ok=True)
    (path / name.partition(" ")[0].removesuffix(".v1")).write_bytes(
        zlib.decompress(base64.b64decode(CASES[name]["file"]))
    )
    for other, content in files.items():
        (path / f"{other}.json").write_text(json.dumps(content))
    return path


def load(name, path, **files):
    named = name if name.endswith((".v1", ".v3", ".v7")) or name.startswith("tekken") else "tokenizer.model"
    folder = folder_of(name, path, **files)
    if named == "tokenizer.model":
        (folder / name).rename(folder / named)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_texts_are_those_of_the_reference(name, tmp_path):
    tokenizer, case = load(name, tmp_path), CASES[name]
    for text, ids, decoded in zip(case["texts"], case["ids"], case["decoded"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [1, *ids]
        if 0 not in ids:  # of an unknown character nothing is left here, and a mark in sentencepiece
            assert tokenizer.decode(ids) == decoded


@pytest.mark.parametrize("name", CASES)
def test_streamed_texts_are_whole_ones_at_every_cut(name, tmp_path):
    tokenizer = load(name, tmp_path)
    for ids in CASES[name]["ids"]:
        whole = tokenizer.decode(ids)
        detokenizer = Detokenizer(tokenizer)
        pushed = [detokenizer.push(token) for token in ids]
        assert "".join(pushed) + detokenizer.finish() == whole
        if "\ufffd" not in whole:
            assert all(whole.startswith("".join(pushed[:cut])) for cut in range(len(ids)))


@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_those_of_mistral_common(name, tmp_path):
    tokenizer = load(name, tmp_path, params={})
    chat = ChatModel(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)
    function = made.TOOL["function"]
    use = ToolUse((Tool(function["name"], function["description"], function["parameters"]),))
    version = name.rpartition("v")[2]
    conversations = made.conversations(f"v{version}")
    assert len(conversations) == len(CASES[name]["chats"])
    for (messages, with_tool), ids in zip(conversations, CASES[name]["chats"], strict=True):
        asked = Conversation([dict(message) for message in messages], use if with_tool else ToolUse())
        assert chat.prepare(asked).ids == ids, messages
    assert tokenizer.eos_ids == {2} and tokenizer.bos_id == 1


def test_a_thought_stands_before_its_answer(tmp_path):
    messages = [made.said("user", "a"), made.said("assistant", "b", reasoning_content="c"), made.said("user", "a")]
    for version in ("v13", "v15"):
        rendered = load(f"tekken.json {version}", tmp_path).render_chat(messages)
        assert rendered.endswith("[INST]a[/INST][THINK]c[/THINK]b</s>[INST]a[/INST]")


def test_the_effort_that_a_model_is_told(tmp_path):
    tokenizer, messages = load("tekken.json v15", tmp_path), [made.said("user", "a")]
    for given, told in (({}, "high"), (dict(reasoning_effort="none"), "none"), (dict(reasoning_effort=None), "high")):
        settings = f'[MODEL_SETTINGS]{{"reasoning_effort": "{told}"}}[/MODEL_SETTINGS]'
        assert tokenizer.render_chat(messages, **given) == f"<s>{settings}[INST]a[/INST]"
    with pytest.raises(ValueError, match="reasoning_effort: expected one of high, none, got low"):
        tokenizer.render_chat(messages, reasoning_effort="low")


def test_a_model_that_is_told_no_settings(tmp_path):
    content = json.loads(zlib.decompress(base64.b64decode(CASES["tekken.json v15"]["file"])))
    for builder in (None, {}, {"reasoning_effort": None}):
        (tmp_path / "tekken.json").write_text(json.dumps(content | dict(model_settings_builder=builder)))
        assert load_tokenizer(tmp_path).render_chat([made.said("user", "a")]) == "<s>[INST]a[/INST]"


def test_which_file_wins(tmp_path):
    model = folder_of("tokenizer.model.v1", tmp_path)
    assert load_tokenizer(model).vocab_size < 500 and "▁" in load_tokenizer(model).backend.get_vocab()
    (tmp_path / "tokenizer.model.v1").write_bytes(b"")
    folder_of("tokenizer.model.v3", tmp_path)
    assert "[PREFIX]" in load_tokenizer(tmp_path).backend.get_vocab()
    folder_of("tekken.json v3", tmp_path)
    assert "<SPECIAL_30>" in load_tokenizer(tmp_path).backend.get_vocab()
    write_folder(tmp_path, byte_level())
    assert "<|begin|>" in load_tokenizer(tmp_path).backend.get_vocab()


def test_a_gguf_file_without_a_tokenizer_takes_the_one_beside_it(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert not has_tokenizer(file, {})
    folder_of("tekken.json v3", tmp_path)
    assert has_tokenizer(file, {}) and "<SPECIAL_30>" in find_tokenizer(file, {}).backend.get_vocab()
    assert "▁the" in find_tokenizer(file, words_metadata()).backend.get_vocab()


def test_templates_of_a_folder_win_and_other_vocabularies_have_none(tmp_path):
    own = load("tokenizer.model.v3", tmp_path / "own", tokenizer_config=dict(chat_template="mine"))
    assert own.chat_templates == {"default": "mine"}
    assert load("tokenizer.model.user_defined", tmp_path / "other", params={}).has_chat_template
    assert not load("tokenizer.model.user_defined", tmp_path / "plain").has_chat_template


def test_settings_beside_a_vocabulary(tmp_path):
    size = load("tokenizer.model.v1", tmp_path / "0").vocab_size
    files = dict(
        added_tokens={"<|im_start|>": size, "<|im_end|>": size + 1},
        tokenizer_config=dict(add_bos_token=False, add_eos_token=True, additional_special_tokens=["<|im_start|>"]),
        generation_config=dict(eos_token_id=size + 1),
    )
    tokenizer = load("tokenizer.model.v1", tmp_path / "1", **files)
    plain = tokenizer.encode("the ab", add_special_tokens=False)
    assert tokenizer.encode("the ab") == [*plain, 2] and tokenizer.eos_ids == {2, size + 1}
    assert tokenizer.encode("<|im_start|>") == [size, 2] and tokenizer.special_ids >= {size} - {size + 1}
    (tmp_path / "1" / "added_tokens.json").write_text('{"<a>": -1}')
    with pytest.raises(ValueError, match=r"added_tokens\.json: expected an id for each token"):
        load_tokenizer(tmp_path / "1")


def test_where_the_space_goes():
    prefix, everywhere = (SpacePrefix(("<s>", "[A]", "[A]]"), after_marks) for after_marks in (False, True))
    assert [prefix.added_to(text) for text in ("", "a", " a", "<s>a", "a<s>b")] == ["", "▁a", "▁ a", "<s>a", "▁a<s>b"]
    assert everywhere.added_to("<s>a[A]][A] b<s>") == "<s>▁a[A]][A]▁ b<s>"
    assert SpacePrefix((), True).added_to("a") == "▁a" and SpacePrefix(()).added_to("") == ""


def test_legacy_puts_a_space_after_marks(tmp_path):
    modern, legacy = (
        load("tokenizer.model.v3", tmp_path / name, tokenizer_config=dict(legacy=name == "legacy"))
        for name in ("modern", "legacy")
    )
    assert legacy.encode("<s>the", False) == modern.encode("<s> the", False) != modern.encode("<s>the", False)
    said = [made.said("user", "the ab")]
    assert legacy.encode_chat(said) == modern.encode_chat(said)
    assert legacy.serialized != modern.serialized


def test_merges_are_those_by_which_tokens_are_reached():
    ranks = {token: rank for rank, token in enumerate(["ab", "ba", "aba", "bb", "abba", "cd", "xcdy"])}
    assert merges_of(ranks) == [("a", "b"), ("b", "a"), ("ab", "a"), ("b", "b"), ("ab", "ba"), ("c", "d")]
    spaces = merges_of({"_" * length: 0.0 for length in range(2, 6)})
    assert spaces == [("_" * length, "_") for length in (4, 3, 2, 1)]
    with pytest.raises(ValueError, match=r"squares of its tokens' lengths are \d+ together, at most \d+ are allowed"):
        merges_of({"a" * (1 << 14): 0})


@pytest.mark.parametrize("seed", range(3))
def test_merges_join_as_ranks_do(seed):
    """Against joining by ranks, written down plainly, on letters that merge in many ways."""
    rng = random.Random(seed)
    ranks = {letter: rank for rank, letter in enumerate("abc")}
    while len(ranks) < 60:
        ranks.setdefault("".join(rng.choice([*ranks]) for _ in range(2)), len(ranks))
    order = {pair: rank for rank, pair in enumerate(merges_of(ranks))}

    def joined(text, rank_of):
        parts = list(text)
        while True:
            found = [(rank_of(a, b), at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
            best = min((pair for pair in found if pair[0] is not None), default=None)
            if best is None:
                return parts
            parts[best[1] : best[1] + 2] = ["".join(parts[best[1] : best[1] + 2])]

    for _ in range(60):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(2, 25)))
        assert joined(text, lambda a, b: order.get((a, b))) == joined(text, lambda a, b: ranks.get(a + b))
