"""The text parts of Qwen models that also see: their configs, their names, experts that are stored transposed."""

from dataclasses import replace

import numpy as np
import pytest

from lockstep.models import experts
from lockstep.models.model_config import Experts, Heads, Mlp, Rope
from lockstep.models.registry import model_config
from tests.golden.record_models import GOLDEN
from tests.models import tiny
from tests.models.cases import CASES, SEED, nested
from tests.models.published import qwen as p
from tests.models.running import load, logits_of
from tests.models.test_mutations import is_red, run
from tests.models.test_qwen_experts import stacked

VISION = ("qwen2_vl", "qwen2_5_vl_window", "qwen3_vl", "qwen3_vl_moe")


def test_published_configs():
    for config, heads, mlp, tied in (
        (p.QWEN2_5_VL_3B, Heads(16, 2, 128, 128**-0.5, Rope(128, 1e6), qkv_bias=True), Mlp(11008), True),
        (p.QWEN3_VL_2B, Heads(16, 8, 128, 128**-0.5, Rope(128, 5e6)), Mlp(6144), True),
        (
            p.QWEN3_VL_30B_A3B,
            Heads(32, 4, 128, 128**-0.5, Rope(128, 5e6)),
            Experts(128, 8, 768, True, transposed=True),
            False,
        ),
    ):
        made = model_config(config)
        assert {layer.mixer for layer in made.layers} == {heads} and {layer.mlp for layer in made.layers} == {mlp}
        assert made.tied == tied and made.eos_ids == (151645,)


def test_what_a_silent_config_means():
    def rope_of(name, *keys):
        text = {k: v for k, v in tiny.text_part(CASES[name]).items() if k not in ("rope_theta", *keys)}
        return model_config(text).layers[0].mixer.rope

    assert rope_of("qwen2_vl") == Rope(16, 1e6)
    assert rope_of("qwen3_vl") == rope_of("qwen3_vl", "rope_scaling") == Rope(32, 5e5)
    sliding = {**CASES["qwen2_vl"], "use_sliding_window": True, "sliding_window": 9}
    assert [layer.window for layer in model_config(sliding).layers] == [0] * 3


def test_an_older_config_has_the_keys_of_text_beside_those_of_vision():
    old = CASES["qwen2_vl"]
    text = {key: value for key, value in old.items() if key != "vision_config"}
    new = nested({**text, "model_type": "qwen2_vl_text"}, "qwen2_vl", old["vision_config"])
    assert model_config(new).layers == model_config(old).layers


@pytest.mark.parametrize("name", VISION)
def test_tensors_of_vision_are_skipped(name, tmp_path):
    arrays = tiny.tensors(CASES[name], SEED)
    seeing = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "deepstack_merger_list.0.norm.weight")
    for prefix in ("visual.", "model.visual."):
        arrays |= {f"{prefix}{part}": np.ones(4, np.float32) for part in seeing}
    assert load(tiny.write(tmp_path, CASES[name], arrays)).config.vocab_size == 96


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rope_scaling={"type": "mrope", "mrope_section": [4, 2, 2], "factor": 2.0}), "rope parameter 'factor'"),
        (dict(sliding_window=9), "'sliding_window' (value 9) is not supported"),
        (dict(num_experts=4), "'num_experts' (value 4) is not supported"),
    ],
    ids=str,
)
def test_refused(changes, message):
    with pytest.raises(ValueError) as raised:
        model_config({**CASES["qwen3_vl"], "text_config": {**CASES["qwen3_vl"]["text_config"], **changes}})
    assert message in str(raised.value)


# ------------------------------------------------------------ transposed experts


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def test_experts_in_any_form_are_the_same(tmp_path):
    """Transposed and stacked as published; stacked but not transposed, and one by one, as tools may write them."""
    config, logits = CASES["qwen3_vl_moe"], []
    transposed = tiny.tensors(config, SEED)
    one_by_one = apart(transposed)
    for name, arrays in (("a", transposed), ("b", one_by_one), ("c", stacked(one_by_one))):
        (tmp_path / name).mkdir()
        logits.append(logits_of(load(tiny.write(tmp_path / name, config, arrays)), tiny.prompt(config, 20)))
    assert logits[0].tobytes() == logits[1].tobytes() == logits[2].tobytes()


def apart(arrays):
    """A checkpoint with transposed stacks as one with matrices of single experts."""
    made = {}
    for name, array in arrays.items():
        before, found, part = name.rpartition(".experts.")
        if not found:
            made[name] = array
            continue
        gate, up = np.split(array, 2, axis=2)
        halves = {part: array} if part == "down_proj" else {"gate_proj": gate, "up_proj": up}
        for proj, stack in halves.items():
            made |= {f"{before}.experts.{e}.{proj}.weight": np.ascontiguousarray(stack[e].T) for e in range(len(stack))}
    return made


def test_experts_that_are_not_turned_are_seen(golden, tmp_path, monkeypatch):
    """Their bytes read in the order of a stack that is not transposed."""

    def straight(stack, index):
        matrix = experts_transposed(stack, index)
        return replace(matrix, make=lambda rows: matrix.read().T.reshape(matrix.shape)[rows])

    experts_transposed = experts.transposed
    monkeypatch.setattr(experts, "transposed", straight)
    is_red(run(tmp_path, "qwen3_vl_moe"), golden, "qwen3_vl_moe")


def test_a_stack_of_another_shape_is_named(tmp_path):
    config, name = CASES["qwen3_vl_moe"], "model.language_model.layers.0.mlp.experts.down_proj"
    arrays = tiny.tensors(config, SEED) | {name: np.zeros((16, 32, 64), np.float32)}
    with pytest.raises(ValueError) as raised:
        load(tiny.write(tmp_path, config, arrays))
    assert str(raised.value) == f"tensor '{name}': expected shape [16, 48, 64], found [16, 32, 64]"
