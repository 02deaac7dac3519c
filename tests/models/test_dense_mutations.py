"""Plausible mistakes in Phi, Mistral, Granite, OLMo and Seed-OSS, planted as in `test_mutations.py`."""

import numpy as np
import pytest

from lockstep.ops.attention.kv_cache import AttentionInputs
from lockstep.runtime.program import Weight
from lockstep.weights.tensor import StoredTensor
from tests.golden.record_models import GOLDEN
from tests.models import tiny
from tests.models.cases import CASES, GROWING, LONGROPE, SEED
from tests.models.test_mutations import ATTENTION, INPUTS, is_red, of_norm, params, run, without_bias_of


@pytest.fixture(scope="module")
def recorded():
    return np.load(GOLDEN)


def first(norm):
    """The norm of the first head, of 16 channels, out of the norm of all heads."""
    [part] = norm.parts
    part = StoredTensor("first", "f32", (16,), part.data[:16])
    return Weight(f"{norm.name}.first", "f32", (16,), (part,))


def inputs(**changed):
    """A change of operands of what prepares attention's inputs; a value may be a function of the op."""

    def change(op):
        if not isinstance(op, AttentionInputs):
            return op
        return op.changed(**{k: v(op) if callable(v) else v for k, v in changed.items()})

    return change


OPS = {
    "the window of Phi one too short": ("phi3", params(ATTENTION, window=8)),
    "no rope on Phi's first channels": ("phi3_long", params(INPUTS, rope_dim=0)),
    "queries do not grow": ("ministral3", inputs(q_cos=None, q_sin=None)),
    "keys grow, too": ("ministral3", inputs(cos=lambda op: op.q_cos, sin=lambda op: op.q_sin)),
    "queries of the nested model do not grow": ("mistral3_nested", inputs(q_cos=None, q_sin=None)),
    "residuals of Granite not multiplied": ("granite", params(["add"], factor=1.0)),
    "half of Granite's residuals not multiplied": (
        "granite",
        lambda op: params(["add"], factor=1.0)(op) if op.outputs and "mlp" in op.outputs[0].name else op,
    ),
    "experts of Granite not renormalised": ("granitemoe", params(["route"], renormalise=False)),
    "residuals of Granite's experts not multiplied": ("granitemoe", params(["add"], factor=1.0)),
    "embedding of Granite not multiplied": ("granite", params(["embed_f32"], scale=1.0)),
    "scores of Granite scaled by the size of heads": ("granite", params(ATTENTION, scale=0.25)),
    "eps of OLMo's head norms forgotten": ("olmo2", params(INPUTS, eps=0.0)),
    "+1 in OLMo's head norms": ("olmo2", params(INPUTS, norm_offset=1.0)),
    "eps of OLMo's norms after attention forgotten": ("olmo2", of_norm("post_attention", eps=0.0)),
    "eps of OLMo's norms after the MLP forgotten": ("olmo2", of_norm("post_feedforward", eps=0.0)),
    "each of OLMo's heads normed by itself": (
        "olmo2",
        inputs(whole_norms=False, q_norm=lambda op: first(op.q_norm), k_norm=lambda op: first(op.k_norm)),
    ),
    "bias of Seed's output forgotten": ("seed_oss_all_biased", without_bias_of("o_proj")),
    "biases of Seed's queries, keys and values forgotten": ("seed_oss", without_bias_of("q_proj")),
    "biases of Seed's MLP forgotten": ("seed_oss_all_biased", without_bias_of("down_proj")),
    "values of Phi taken for keys": ("phi3", params(INPUTS, k_offset=lambda op: op.params["v_offset"])),
}


@pytest.mark.parametrize("mistake", OPS)
def test_a_mistake_in_the_program_is_seen(mistake, recorded, tmp_path):
    name, change = OPS[mistake]
    is_red(run(tmp_path, name, ops=change), recorded, name)


def swapped(first, second):
    """Rows of a tensor with two blocks of rows, of these sizes, swapped: what follows stays."""
    return lambda a: np.concatenate([a[first : first + second], a[:first], a[first + second :]])


WEIGHTS = {
    "up before gate": ("phi3", "gate_up_proj", swapped(96, 96)),
    "keys before queries": ("phi3_long", "qkv_proj", swapped(64, 32)),
    "heads of Phi as q, k and v side by side": (
        "phi3",
        "qkv_proj",
        lambda a: a.reshape(4, 3, 16, -1).swapaxes(0, 1).reshape(a.shape),
    ),
    "up before gate in Granite's experts": (
        "granitemoe",
        "input_linear",
        lambda a: np.concatenate([a[:, 48:], a[:, :48]], axis=1),
    ),
    "gate and up of Granite's experts in turn": (
        "granitemoe",
        "input_linear",
        lambda a: a.reshape(6, 2, 48, 64).swapaxes(1, 2).reshape(a.shape),
    ),
    "Granite's experts in another order": ("granitemoe", "output_linear", lambda a: a[[1, 0, *range(2, 6)]]),
    "norms of OLMo's first and second query head swapped": ("olmo2", "q_norm", swapped(16, 16)),
    "channels that rotate last": (
        "phi3_long",
        "qkv_proj",
        lambda a: np.concatenate([np.roll(a[:96].reshape(6, 16, -1), 4, axis=1).reshape(96, -1), a[96:]]),
    ),
}


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_a_mistake_in_the_weights_is_seen(mistake, recorded, tmp_path):
    name, part, change = WEIGHTS[mistake]
    arrays = tiny.tensors(CASES[name], SEED)
    changed = {n: np.ascontiguousarray(change(a)) if f".{part}." in n else a for n, a in arrays.items()}
    assert any((changed[n] != arrays[n]).any() for n in arrays)
    is_red(run(tmp_path, name, changed), recorded, name)


GROWN = CASES["mistral3_nested"]["text_config"]["rope_parameters"]


def growing(given=GROWING, **changes):
    """A change of parameters of Ministral's rope."""
    return dict(rope_parameters={**given, **changes})


def olmo_ropes(**changes):
    """A change of the rope of one type of OLMo's layers."""
    return dict(rope_parameters={**CASES["olmo3"]["rope_parameters"], **changes})


def nested(changes):
    """A change of the text part."""
    return dict(text_config={**CASES["mistral3_nested"]["text_config"], **changes})


BOTH = LONGROPE["long_factor"], LONGROPE["short_factor"]
CONFIGS = {
    "queries grow with the factor of the rope": ("ministral3", growing(llama_4_scaling_beta=0.1)),
    "queries grow one token later": ("ministral3", growing(original_max_position_embeddings=10)),
    "yarn of Ministral without its scales": ("mistral3_nested", nested(growing(GROWN, mscale=1.0, mscale_all_dim=1.0))),
    "yarn on OLMo's layers with a window, too": (
        "olmo3",
        olmo_ropes(sliding_attention={**CASES["olmo3"]["rope_parameters"]["full_attention"], "rope_theta": 50.0}),
    ),
    "one theta for all of OLMo's layers": ("olmo3", olmo_ropes(sliding_attention={"rope_theta": 500.0})),
    "yarn of OLMo forgotten": ("olmo3", olmo_ropes(full_attention={"rope_theta": 500.0})),
    "OLMo's windows one too long": ("olmo3", dict(sliding_window=10)),
    "OLMo's windows on other layers": (
        "olmo3",
        dict(layer_types=["full_attention", *["sliding_attention"] * 3]),
    ),
    "one of Granite's experts too few": ("granitemoe", dict(num_experts_per_tok=2)),
    "logits of Granite not divided": ("granite", dict(logits_scaling=1.0)),
    "logits of Granite multiplied": ("granite_tied", dict(logits_scaling=1 / 0.3)),
    "window of Ministral forgotten": ("mistral3_nested", nested(dict(sliding_window=None))),
    "short factors in a long context": (
        "phi3_long",
        dict(rope_scaling={**LONGROPE, "long_factor": BOTH[1], "short_factor": BOTH[0]}),
    ),
    "long factors in a short context": (
        "phi3_short",
        dict(rope_scaling={**CASES["phi3_short"]["rope_scaling"], "long_factor": BOTH[1], "short_factor": BOTH[0]}),
    ),
    "longrope without its factor on the tables": (
        "phi3_long",
        dict(rope_scaling={**LONGROPE, "attention_factor": 1.0}),
    ),
    "a factor of the tables that the config names, computed": ("phi3_short", dict(rope_scaling=LONGROPE)),
    "the window of Phi forgotten": ("phi3", dict(sliding_window=None)),
    "longrope forgotten": ("phi3_long", dict(rope_scaling=None)),
}


@pytest.mark.parametrize("mistake", CONFIGS)
def test_a_misread_config_is_seen(mistake, recorded, tmp_path):
    name, changes = CONFIGS[mistake]
    is_red(run(tmp_path, name, config={**CASES[name], **changes}), recorded, name)
