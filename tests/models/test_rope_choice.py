"""`--rope short`: a model with longrope runs with the short factors, for the context that they are for, and says so."""

import pytest

from lockstep import LLM
from lockstep.models.registry import model_config
from lockstep.models.rope_config import with_rope
from lockstep.receipts.identity import difference
from lockstep.serve.service import system_fingerprint
from tests.models import tiny
from tests.models.cases import CASES, LONGROPE, SEED, case
from tests.models.running import load, logits_of

LONG = CASES["phi3_long"]  # 256 positions, first trained with 32
TWIN = {**LONG, "max_position_embeddings": 32, "rope_scaling": {**LONGROPE, "factor": 8.0}}  # short by its own config


def folder_of(folder, config):
    folder.mkdir()
    return tiny.write(folder, config, tiny.tensors(config, SEED))


def test_the_config_has_the_short_factors_and_their_context():
    long, short = model_config(LONG), with_rope(model_config(LONG), "short")
    assert with_rope(long, "auto") is long and short == model_config(TWIN) and short.max_positions == 32
    assert all(layer.mixer.rope.scaling.factors == tuple(LONGROPE["short_factor"]) for layer in short.layers)
    assert {layer.mixer.rope.scaling.factor for layer in (*long.layers, *short.layers)} == {8.0}


def test_a_text_has_the_bits_of_the_model_whose_own_config_says_short(tmp_path):
    ids = tiny.prompt(LONG, 32)
    model = load(folder_of(tmp_path / "long", LONG), rope="short")
    found, cut = logits_of(model, ids), logits_of(model, ids, (1, 9, 23))
    assert (model.max_context, model.rope) == (32, "short") and found.tobytes() == cut.tobytes()
    twin = load(folder_of(tmp_path / "twin", TWIN))
    assert twin.rope == "" and found.tobytes() == logits_of(twin, ids).tobytes()
    assert found.tobytes() != logits_of(load(tmp_path / "long"), ids).tobytes()


def test_receipts_and_fingerprints_name_the_choice(tmp_path):
    folder = folder_of(tmp_path / "long", LONG)
    with LLM(folder, progress=False, threads=1) as usual, LLM(folder, rope="short", progress=False, threads=1) as short:
        assert (usual.model_part.rope, short.model_part.rope) == (None, "short")
        assert system_fingerprint(usual) != system_fingerprint(short)
        assert difference(0, short.model_part, usual.model_part) is not None
        assert short.max_context == 32


def test_a_choice_that_changes_nothing_is_none(tmp_path):
    assert load(folder_of(tmp_path / "twin", TWIN), rope="short").rope == ""


@pytest.mark.parametrize(
    "config, rope, said",
    [
        (case("llama"), "short", r"rope 'short': expected a model .*longrope.*, but llama has none; allowed is 'auto'"),
        (CASES["qwen3_5"], "short", "but qwen3_5_text has none"),
        (CASES["phi3"], "short", "but phi3 has none"),
        (LONG, "long", "rope 'long': expected one of auto, short"),
    ],
)
def test_other_models_and_other_choices_are_refused_by_name(config, rope, said):
    with pytest.raises(ValueError, match=said):
        with_rope(model_config(config), rope)
