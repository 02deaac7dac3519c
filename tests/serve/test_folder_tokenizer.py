"""What the files of Hugging Face folders say about text: templates, special tokens, ends."""
import json

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from lockstep.serve.tokenizer import load_tokenizer
from tests.serve.vocabularies import byte_level, write_folder

HELLO = [dict(role="user", content="hi")]
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn end>\n{% endfor %}"


def folder(path, files=(), backend=None, **config):
    write_folder(path, backend or byte_level(), **config)
    for name, text in dict(files).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return load_tokenizer(path)


@pytest.mark.parametrize("files, config, expected", [
    ({"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "T"}, {},
     dict(default="D", tool_use="T")),
    ({"additional_chat_templates/tool_use.jinja": "T"}, dict(chat_template="C"), dict(default="C", tool_use="T")),
    ({"chat_template.jinja": "D"}, dict(chat_template="C"), dict(default="D")),
    ({"chat_template.json": '{"chat_template": "J"}'}, {}, dict(default="J")),
    ({"chat_template.json": '{"chat_template": "J"}'}, dict(chat_template="C"), dict(default="C")),
    ({"chat_template.jinja": " \n"}, dict(chat_template="C"), dict(default="C")),
    ({"additional_chat_templates/rag.jinja": ""}, dict(chat_template=""), {}),
    ({}, dict(chat_template=[dict(name="default", template=""), dict(name="rag", template="R")]), dict(rag="R")),
])
def test_where_templates_come_from(files, config, expected, tmp_path):
    tokenizer = folder(tmp_path, files, **config)
    assert tokenizer.chat_templates == expected and tokenizer.has_chat_template == bool(expected)


def test_special_tokens_map(tmp_path):
    named = dict(eos_token=dict(content="<|end|>"), bos_token="<|begin|>", pad_token="<|end|>")
    tokenizer = folder(tmp_path, {"special_tokens_map.json": json.dumps(named)}, pad_token=None)
    end, begin = map(tokenizer.backend.token_to_id, ("<|end|>", "<|begin|>"))
    assert tokenizer.eos_ids == {end} and tokenizer.bos_id == begin
    assert tokenizer.special_tokens == dict(eos_token="<|end|>", bos_token="<|begin|>")
    assert folder(tmp_path, eos_token="<|begin|>").eos_ids == {begin}
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ValueError, match="special_tokens_map.json: expected a JSON object"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("template, mark", [
    (TURNS, "<turn end>"), (TURNS.replace("<turn end>", " <|end|>"), "<|end|>"),
    (TURNS.replace("<turn end>", "{{ eos_token }}"), "<|begin|>"), (TURNS.replace("<turn end>", "<no token>"), None),
    (TURNS.replace("<turn end>", ""), None), ("{{ raise_exception('never') }}", None), ("no message", None),
    ("{% for m in messages %}<turn end>{{ m.content }}{% endfor %}", None)])
def test_the_end_mark_of_the_template_is_an_end(template, mark, tmp_path):
    backend = byte_level()
    backend.add_tokens([AddedToken("<turn end>", special=False, normalized=False), AddedToken("<turn", special=False)])
    tokenizer = folder(tmp_path, {"config.json": '{"eos_token_id": 7}'}, backend, eos_token="<|begin|>",
                       chat_template=template)
    named = {7, tokenizer.backend.token_to_id("<|begin|>")}
    assert list(tokenizer._compiled) == ["default"], "it is compiled once"
    assert tokenizer.eos_ids == named | ({tokenizer.backend.token_to_id(mark)} if mark else set())


def test_a_prompt_that_begins_with_bos_gets_no_second_one(tmp_path):
    backend = byte_level()
    begin, end = map(backend.token_to_id, ("<|begin|>", "<|end|>"))
    backend.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", pair=None, special_tokens=[("<|begin|>", begin), ("<|end|>", end)])
    tokenizer = folder(tmp_path, {}, backend)
    hi = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == tokenizer.encode("<|begin|>hi") == [begin, *hi, end]
    assert tokenizer.encode("<|begin|><|begin|>hi") == [begin, begin, *hi, end]
    assert tokenizer.encode("") == tokenizer.encode("<|begin|>") == [begin, end]
    assert tokenizer.encode("<|begin|>hi", add_special_tokens=False) == [begin, *hi]
    backend.post_processor = TemplateProcessing(single="$A <|end|>", pair=None, special_tokens=[("<|end|>", end)])
    assert folder(tmp_path, {}, backend).encode("<|end|><|end|>") == [end] * 3
