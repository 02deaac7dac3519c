"""How checkpoints say that embeddings are pooled, and checkpoints that only make embeddings."""

import json

import numpy as np
import pytest

from lockstep import LLM, SamplingParams
from lockstep.models.pooling import default_pooling
from tests.models import tiny
from tests.models.cases import CASES

SWITCHES = dict(
    word_embedding_dimension=64,
    pooling_mode_cls_token=False,
    pooling_mode_mean_tokens=False,
    pooling_mode_lasttoken=False,
    include_prompt=True,
)


def pooled(folder, **config):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return default_pooling(folder, {})


def test_where_pooling_is_said(tmp_path):
    assert default_pooling(tmp_path, {}) == default_pooling(tmp_path / "m.gguf", {}) == "last"
    assert default_pooling(tmp_path / "m.gguf", {"pooling_type": "mean"}) == "mean"
    assert pooled(tmp_path, **SWITCHES | dict(pooling_mode_mean_tokens=True)) == "mean"
    assert pooled(tmp_path, **SWITCHES | dict(pooling_mode_lasttoken=True)) == "last"
    assert pooled(tmp_path, pooling_mode="mean") == "mean" and pooled(tmp_path, pooling_mode="lasttoken") == "last"
    assert pooled(tmp_path, **SWITCHES) == "last"


@pytest.mark.parametrize(
    "config, found",
    [
        (dict(pooling_mode="cls"), "cls"),
        (dict(pooling_mode_cls_token=True), "cls_token"),
        (dict(pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True), "mean_tokens and max_tokens"),
    ],
)
def test_pooling_that_is_not_supported(config, found, tmp_path):
    with pytest.raises(ValueError, match=f"1_Pooling/config.json: pooling by {found} is not supported"):
        pooled(tmp_path, **config)


def embedding_folder(path, **changes):
    """A checkpoint as sentence-transformers writes it: tensor names of a class without a language-model head."""
    config = {**CASES["qwen3"], "architectures": ["Qwen3Model"], **changes}
    arrays = {name.removeprefix("model."): array for name, array in tiny.tensors(config, 3).items()}
    arrays.pop("lm_head.weight", None)
    return tiny.write(path, config, arrays)


def test_a_checkpoint_without_a_head_makes_embeddings_and_no_text(tmp_path):
    folder = embedding_folder(tmp_path / "bare")
    pooled(folder, pooling_mode="mean")
    whole = LLM(str(tiny.write(tmp_path / "whole", CASES["qwen3"], tiny.tensors(CASES["qwen3"], 3))), threads=1)
    bare = LLM(str(folder), threads=1)
    prompts = [[1, 5, 9, 30], [7]]
    assert bare.pooling == "mean" and whole.pooling == "last"
    assert bare.embed(prompts).tobytes() == whole.embed(prompts, pooling="mean").tobytes()
    assert not np.array_equal(bare.embed(prompts), whole.embed(prompts))
    with pytest.raises(ValueError, match="no lm_head: it makes embeddings, and no text"):
        bare.generate(prompts, SamplingParams(max_tokens=1))
    for llm in (whole, bare):
        llm.close()


def test_a_missing_head_of_a_model_that_has_one_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"tensor 'lm_head\.weight' of shape .* is missing"):
        LLM(str(embedding_folder(tmp_path, architectures=["Qwen3ForCausalLM"])))


def test_a_tied_head_is_there(tmp_path):
    llm = LLM(str(embedding_folder(tmp_path, tie_word_embeddings=True)), threads=1)
    assert llm.generate([[1, 2]], SamplingParams(max_tokens=1))[0].token_ids
    llm.close()
