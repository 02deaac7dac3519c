"""Chat templates, special tokens and end tokens from the files of Hugging Face folders."""

import json

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from lockstep.text.tokenizer.tokenizer import load_tokenizer
from tests.text.vocabularies import byte_level, write_folder

HELLO = [dict(role="user", content="hi")]
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn end>\n{% endfor %}"


def folder(path, files=(), backend=None, **config):
    write_folder(path, backend or byte_level(), **config)
    for name, text in dict(files).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return load_tokenizer(path)


@pytest.mark.parametrize(
    "files, config, expected",
    [
        (
            {"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "T"},
            {},
            dict(default="D", tool_use="T"),
        ),
        ({"additional_chat_templates/tool_use.jinja": "T"}, dict(chat_template="C"), dict(default="C", tool_use="T")),
        ({"chat_template.jinja": "D"}, dict(chat_template="C"), dict(default="D")),
        ({"chat_template.json": '{"chat_template": "J"}'}, {}, dict(default="J")),
        ({"chat_template.json": '{"chat_template": "J"}'}, dict(chat_template="C"), dict(default="C")),
        ({"chat_template.jinja": " \n"}, dict(chat_template="C"), dict(default="C")),
        ({"additional_chat_templates/rag.jinja": ""}, dict(chat_template=""), {}),
        ({}, dict(chat_template=[dict(name="default", template=""), dict(name="rag", template="R")]), dict(rag="R")),
    ],
)
def test_where_templates_come_from(files, config, expected, tmp_path):
    tokenizer = folder(tmp_path, files, **config)
    assert tokenizer.chat_templates == expected and tokenizer.has_chat_template == bool(expected)


def test_special_tokens_map(tmp_path):
    named = dict(eos_token=dict(content="<|end|>"), bos_token="<|begin|>", pad_token="<|end|>")
    tokenizer = folder(tmp_path, {"special_tokens_map.json": json.dumps(named)}, pad_token=None)
    end, begin = map(tokenizer.backend.token_to_id, ("<|end|>", "<|begin|>"))
    assert tokenizer.eos_ids == {end} and tokenizer.bos_id == begin
    assert tokenizer.special_tokens == dict(eos_token="<|end|>", bos_token="<|begin|>", pad_token="<|end|>")
    both = folder(tmp_path, eos_token="<|begin|>")
    assert both.eos_ids == {begin, end} and both.special_tokens["eos_token"] == "<|begin|>"
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: expected a JSON object"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("silent", [{}, *({"eos_token": value} for value in (None, [], {}, 7, {"content": None}))])
@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_a_file_that_says_nothing_hides_no_end_of_the_other(name, silent, tmp_path):
    said = dict(eos_token="<|end|>")
    of_map, of_config = (said, silent) if name == "special_tokens_map.json" else (silent, said)
    tokenizer = folder(tmp_path, {"special_tokens_map.json": json.dumps(of_map)}, **of_config)
    assert tokenizer.eos_ids == {tokenizer.backend.token_to_id("<|end|>")} and tokenizer.special_tokens == said


def test_every_file_that_names_an_end_is_heard(tmp_path):
    files = {
        "config.json": dict(eos_token_id=[5, 6]),
        "generation_config.json": dict(eos_token_id=7),
        "special_tokens_map.json": dict(eos_token="<|end|>"),
    }
    tokenizer = folder(tmp_path, {name: json.dumps(text) for name, text in files.items()}, eos_token="<|begin|>")
    assert tokenizer.eos_ids == {5, 6, 7, *map(tokenizer.backend.token_to_id, ("<|begin|>", "<|end|>"))}


def test_an_end_that_is_no_token_is_warned_about(tmp_path, caplog):
    files = {"special_tokens_map.json": json.dumps(dict(eos_token="<|stop|>"))}
    assert len(folder(tmp_path, files, eos_token="<|end|>").eos_ids) == 1
    [record] = caplog.records
    assert record.getMessage() == f"{tmp_path}: eos_token '<|stop|>' is no token: it is ignored"


@pytest.mark.parametrize(
    "template, mark",
    [
        (TURNS, "<turn end>"),
        (TURNS.replace("<turn end>", " <|end|>"), "<|end|>"),
        (TURNS.replace("<turn end>", "{{ eos_token }}"), "<|begin|>"),
        (TURNS.replace("<turn end>", "<no token>"), None),
        (TURNS.replace("<turn end>", ""), None),
        ("{{ raise_exception('never') }}", None),
        ("no message", None),
        ("{% for m in messages %}<turn end>{{ m.content }}{% endfor %}", None),
    ],
)
def test_the_end_mark_of_the_template_is_an_end(template, mark, tmp_path):
    backend = byte_level()
    backend.add_tokens([AddedToken("<turn end>", special=False, normalized=False), AddedToken("<turn", special=False)])
    tokenizer = folder(
        tmp_path, {"config.json": '{"eos_token_id": 7}'}, backend, eos_token="<|begin|>", chat_template=template
    )
    named = {7, tokenizer.backend.token_to_id("<|begin|>")}
    assert list(tokenizer.compiled_templates) == ["default"], "it is compiled once"
    assert tokenizer.eos_ids == named | ({tokenizer.backend.token_to_id(mark)} if mark else set())


def test_a_prompt_that_begins_with_bos_gets_no_second_one(tmp_path):
    backend = byte_level()
    begin, end = map(backend.token_to_id, ("<|begin|>", "<|end|>"))
    backend.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", pair=None, special_tokens=[("<|begin|>", begin), ("<|end|>", end)]
    )
    tokenizer = folder(tmp_path, {}, backend)
    hi = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == tokenizer.encode("<|begin|>hi") == [begin, *hi, end]
    assert tokenizer.encode("<|begin|><|begin|>hi") == [begin, begin, *hi, end]
    assert tokenizer.encode("") == tokenizer.encode("<|begin|>") == [begin, end]
    assert tokenizer.encode("<|begin|>hi", add_special_tokens=False) == [begin, *hi]
    backend.post_processor = TemplateProcessing(single="$A <|end|>", pair=None, special_tokens=[("<|end|>", end)])
    assert folder(tmp_path, {}, backend).encode("<|end|><|end|>") == [end] * 3
