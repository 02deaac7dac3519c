"""SentencePiece puts a space before a text's first word; detokenizing drops the space only there."""

from types import SimpleNamespace

import pytest
import tokenizers

from lockstep import SamplingParams
from lockstep.serve.answers.logprobs import LegacyLogprobs
from lockstep.text.tokenizer.tokenizer import (
    Detokenizer,
    Tokenizer,
    answer_detokenizer,
    load_tokenizer,
    tokenizer_from_gguf,
)
from tests.text.vocabularies import words_metadata, write_folder


def metaspace():
    words = {"<s>": 0, "▁": 1, "▁the": 2, "▁cat": 3, "s": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    backend.add_special_tokens(["<s>"])
    backend.decoder = tokenizers.decoders.Metaspace("▁", "first")
    return Tokenizer(backend, frozenset(), 0, {}, {})


@pytest.fixture(scope="module", params=["gguf", "folder", "metaspace"])
def tokenizer(request, tmp_path_factory):
    if request.param == "metaspace":
        return metaspace()
    if request.param == "gguf":
        return tokenizer_from_gguf(words_metadata())
    backend = tokenizer_from_gguf(words_metadata()).backend
    return load_tokenizer(write_folder(tmp_path_factory.mktemp("folder"), backend, bos_token="<s>"))


def ids_of(tokenizer, *tokens):
    found = [tokenizer.backend.token_to_id(token) for token in tokens]
    assert None not in found
    return found


def asked(prompt_ids, output_ids=(), **options):
    return SimpleNamespace(
        prompt_ids=prompt_ids,
        output_ids=list(output_ids),
        params=SamplingParams(**options),
        prompt_logprobs=[0.0] * (len(prompt_ids) - 1),
        prompt_top_logprobs=[],
        logprobs=[0.0] * len(output_ids),
        top_logprobs=[],
    )


def read(reader, ids):
    return [reader.push(i) for i in ids]


def test_an_answer_keeps_its_first_space(tokenizer):
    the, cat, space = ids_of(tokenizer, "▁the", "▁cat", "▁")
    bos = tokenizer.bos_id
    assert read(answer_detokenizer(tokenizer, asked([bos, the])), [cat, the]) == [" cat", " the"]
    assert read(answer_detokenizer(tokenizer, asked([bos, the])), [space, space, cat]) == [" ", " ", " cat"]
    assert read(answer_detokenizer(tokenizer, asked([bos, the])), [bos, cat]) == ["", " cat"]


@pytest.mark.parametrize("prompt", ["▁the", "▁", "s"])
def test_prompt_and_answer_are_the_text_of_all_ids(tokenizer, prompt):
    prompt_ids = [tokenizer.bos_id, *ids_of(tokenizer, prompt)]
    answer = ids_of(tokenizer, "▁cat", "▁", "s", "▁the")
    text = "".join(read(answer_detokenizer(tokenizer, asked(prompt_ids)), answer))
    assert tokenizer.decode(prompt_ids) + text == tokenizer.decode(prompt_ids + answer)


def test_an_answer_to_no_text_begins_one(tokenizer):
    the, cat = ids_of(tokenizer, "▁the", "▁cat")
    bos = tokenizer.bos_id
    assert read(answer_detokenizer(tokenizer, asked([bos])), [the, cat]) == ["the", " cat"]
    shown = asked([bos], skip_special_tokens=False)
    assert read(answer_detokenizer(tokenizer, shown), [the, cat]) == [" the", " cat"]
    masked = asked([bos], logits_mask=lambda ids: None)
    assert read(answer_detokenizer(tokenizer, masked), [the, cat]) == [" the", " cat"], "grammars count the space"


def test_decoding_alone_begins_a_text(tokenizer):
    the, cat = ids_of(tokenizer, "▁the", "▁cat")
    assert tokenizer.decode([tokenizer.bos_id, the, cat]) == "the cat"
    assert "".join(read(Detokenizer(tokenizer, begins_text=False), [the, cat])) == " the cat"


def test_logprobs_tell_tokens_and_offsets_of_the_text(tokenizer):
    the, cat, s = ids_of(tokenizer, "▁the", "▁cat", "s")
    request = asked([tokenizer.bos_id, the, cat], [s, the, cat])
    logprobs = LegacyLogprobs(tokenizer, request, with_prompt=False)
    first, second = logprobs.part(0, 2), logprobs.part(2, 3)
    assert first["tokens"] + second["tokens"] == ["s", " the", " cat"]
    assert first["text_offset"] + second["text_offset"] == [0, 1, 5]
    echoed = LegacyLogprobs(tokenizer, request, with_prompt=True).part(0, 3)
    assert echoed["tokens"] == ["<s>", "the", " cat", "s", " the", " cat"]
    assert echoed["text_offset"] == [0, 0, 3, 7, 8, 12]
    assert "".join(echoed["tokens"][1:]) == tokenizer.decode([the, cat, s, the, cat])
