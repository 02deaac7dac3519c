"""Draft models: found and loaded like other models, and refused where their vocabulary is not the target's."""

import contextlib
import json
import math
import shutil

import pytest
from tokenizers import AddedToken

from lockstep import LLM, SamplingParams
from lockstep.cli import main
from lockstep.loading import check_tokens
from lockstep.text.grammars import structured
from lockstep.text.grammars.structured import Grammars
from lockstep.text.tokenizer.tokenizer import load_tokenizer
from lockstep.weights.hub import resolve_model
from tests.models import tiny
from tests.models.cases import case
from tests.text.vocabularies import byte_fallback, byte_level, write_folder

PROMPTS = ["def read_lines(path):\n", "import os\n"]
PARAMS = [SamplingParams(max_tokens=40, temperature=t, seed=3, ignore_eos=True) for t in (0.0, 0.8)]
BUNDLED = resolve_model(None)


def answers(**options):
    """(token ids and log-probabilities of the answers, drafts, accepted drafts)."""
    with contextlib.closing(LLM(threads=1, max_context=256, **options)) as llm:
        made = llm.generate(PROMPTS, PARAMS)
        counts = llm.engine.counts()
    return [(c.token_ids, c.logprobs) for c in made], counts["drafts"], counts["accepted_drafts"]


def small(folder, **changes):
    """A random model with as many tokens as the bundled one, and no tokenizer."""
    raw = case("qwen3", head_dim=16, num_hidden_layers=1, vocab_size=4096, **changes)
    return str(tiny.write(folder, raw, tiny.tensors(raw, 3)))


def test_the_model_itself_drafts_what_it_says(tmp_path):
    expected, _, _ = answers()
    found, drafted, accepted = answers(speculate=str(BUNDLED), draft=4)
    assert found == expected and drafted == accepted > 50
    found, drafted, accepted = answers(speculate=small(tmp_path / "small"), draft=4)
    assert found == expected and drafted > accepted


def test_it_guesses_under_the_mask_of_a_grammar():
    grammar, found = structured.regex('(name: "[a-z]{3,9}", age: [1-9][0-9]{0,2}\\n){5}'), []
    for options in (dict(), dict(speculate=str(BUNDLED), draft=4)):
        with contextlib.closing(LLM(threads=1, max_context=256, **options)) as llm:
            grammars = Grammars(llm.tokenizer, llm.engine.eos_ids, llm.vocab_size)
            with contextlib.closing(grammars):
                params = SamplingParams(max_tokens=120, temperature=0.8, seed=2, logits_mask=grammars.mask(grammar))
                [made] = llm.generate(PROMPTS[:1], params)
            found.append((made.token_ids, made.logprobs, made.finish_reason))
            counts = llm.engine.drafter and llm.engine.drafter.counts
    assert found[0] == found[1] and found[0][2] == "stop"
    assert sum(counts["model"].right) > 10
    assert all(each.drafted == each.right for each in counts.values())


def test_the_command_names_a_model(capsys):
    args = ["generate", "-p", PROMPTS[0], "-n", "20", "--temperature", "0.8"]
    expected = None
    for speculate in ("off", str(BUNDLED)):
        assert main([*args, "--speculate", speculate, "--draft", "3"]) == 0
        out = capsys.readouterr().out
        expected = out if expected is None else expected
        assert out == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "lokup",
            "or a smaller model; lokup: no such folder or file, and not a hub",
        ),
        ("", "speculate: expected off, auto, mtp, lookup or a smaller model; : no such folder or file"),
        (
            "./nothing.gguf",
            "speculate: expected off, auto, mtp, lookup or a smaller model; ./nothing.gguf: no such folder or file",
        ),
    ],
)
def test_what_is_no_model_is_named(name, said, capsys):
    assert main(["generate", "-p", "x", "--speculate", name]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected off, auto, mtp, lookup or the name of a smaller model, got 5"):
        LLM(speculate=5)


def broken(folder, change):
    """A copy of the bundled model whose config is changed by `change`."""
    shutil.copytree(BUNDLED, folder)
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(model_type="bert"), "model_type 'bert' is not supported"),
        (lambda raw: raw.update(hidden_act="gelu"), "config key 'hidden_act': 'gelu' is not supported"),
        (lambda raw: raw.update(tie_word_embeddings=False), "tensor 'lm_head.weight' of shape"),
    ],
)
def test_a_draft_model_that_cannot_be_loaded_is_told_from_the_model(tmp_path, change, said):
    folder = broken(tmp_path / "m", change)
    with pytest.raises(ValueError, match=f"speculate: the draft model {folder}: {said}"):
        LLM(speculate=str(folder))


def test_weights_that_are_not_finite_are_told_from_the_models(tmp_path):
    raw = case("qwen3", head_dim=16, num_hidden_layers=1, vocab_size=4096)
    arrays = tiny.tensors(raw, 3)
    arrays["model.norm.weight"][1] = math.nan
    folder = tiny.write(tmp_path / "m", raw, arrays)
    with pytest.raises(ValueError, match=f"speculate: the draft model {folder}: tensor 'model.norm.weight': expected"):
        LLM(speculate=str(folder), threads=1, max_context=64)


def test_an_empty_folder_is_named_once(tmp_path):
    with pytest.raises(ValueError, match=f"speculate: the draft model {tmp_path}: expected model.safetensors"):
        LLM(speculate=str(tmp_path))


def test_another_number_of_tokens_is_refused(tmp_path):
    raw = case("qwen3", head_dim=16, num_hidden_layers=1)
    draft = str(tiny.write(tmp_path / "m", raw, tiny.tensors(raw, 3)))
    with pytest.raises(ValueError, match="speculate: the draft model has another vocabulary: 96 tokens, expected 4096"):
        LLM(speculate=draft)


def test_the_first_token_that_differs_is_named(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(BUNDLED, folder)
    file = folder / "tokenizer.json"
    known = json.loads(file.read_text("utf-8"))
    names = {token_id: token for token, token_id in known["model"]["vocab"].items()}
    known["model"]["vocab"][names[700]], known["model"]["vocab"][names[900]] = 900, 700
    known["model"]["merges"] = []
    file.write_text(json.dumps(known), "utf-8")
    said = f"speculate: the draft model has another vocabulary: its token 700 is {names[900]!r}, that of the model is"
    with pytest.raises(ValueError) as raised:
        LLM(speculate=str(folder))
    assert str(raised.value).startswith(said)


def test_names_of_padding_do_not_count(tmp_path):
    plain = load_tokenizer(write_folder(tmp_path / "a", byte_level()))
    padded = byte_level()
    padded.add_tokens([AddedToken(f"[PAD{i}]", special=False) for i in range(9)])
    longer = load_tokenizer(write_folder(tmp_path / "b", padded))
    for pair in ((plain, plain), (plain, longer), (longer, plain)):
        check_tokens(*pair)
    other = load_tokenizer(write_folder(tmp_path / "c", byte_fallback()))
    with pytest.raises(ValueError, match=r"its token 0 is '<unk>', that of the model is '<\|end\|>'"):
        check_tokens(plain, other)
