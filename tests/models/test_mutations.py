"""Each plausible mistake, planted: the comparison with transformers must turn red."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.golden.record_models import GOLDEN, NUM_TOKENS
from tests.models import mistakes_gemma, tiny
from tests.models.cases import CASES, SEED
from tests.models.mistakes import (
    ATTENTION,
    INPUTS,
    SANDWICH,
    embedding_times,
    of_norm,
    params,
    with_activation,
    without_bias,
    without_bias_of,
)
from tests.models.running import TOLERANCE, difference, load, logits_of


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def run(folder, name, arrays=None, ops=lambda op: op, config=None, **feeding):
    """Logits of a case whose tensors or ops were changed. ops: maps an op to another, or to None to leave it out."""
    config = config or CASES[name]
    model = load(tiny.write(folder, config, arrays or tiny.tensors(config, SEED)))
    program = model.recorded.rewritten([op for op in map(ops, model.recorded.ops) if op is not None])
    return logits_of(dataclasses.replace(model, recorded=program), tiny.prompt(config, NUM_TOKENS), **feeding)


def is_red(found, golden, name):
    worst, _flips = difference(found, golden[f"{name}.logits"])
    assert worst > 10 * TOLERANCE, f"the mistake only moves logits by {worst:.3g}"


OPS = {
    "no +1 in norms": ("qwen3_5", params(["rms_norm"], offset=0.0)),
    "no +1 in head norms": ("qwen3_5", params(INPUTS, norm_offset=0.0)),
    "+1 in norms that have none": ("qwen3", params(["rms_norm"], offset=1.0)),
    "eps as part of the sum, not of the mean": ("qwen3", params(["rms_norm"], eps=lambda op: op.params["eps"] / 64)),
    "eps forgotten": ("llama", params(["rms_norm"], eps=0.0)),
    "eps of head norms forgotten": ("qwen3", params(INPUTS, eps=0.0)),
    "eps of the gated norm forgotten": ("qwen3_5", params(["gated_norm"], eps=0.0)),
    "query and gate swapped": (
        "qwen3_5",
        lambda op: params(INPUTS, q_offset=32)(params(ATTENTION, gate_offset=0)(op)),
    ),
    "gate and queries as two halves": (
        "qwen3_5",
        lambda op: params(INPUTS, q_stride=32)(params(ATTENTION, gate_offset=4 * 32, gate_stride=32)(op)),
    ),
    "keys for values": ("llama", params(INPUTS, v_offset=lambda op: op.params["k_offset"])),
    "no rope on partial heads": ("qwen3_5", params(INPUTS, rope_dim=0)),
    "no rope": ("llama", params(INPUTS, rope_dim=0)),
    "scores not scaled": ("llama", params(ATTENTION, scale=1.0)),
    "scores scaled by 1/K": ("qwen3_5", params(ATTENTION, scale=1 / 32)),
    "window one too short": ("mistral_window", params(ATTENTION, window=lambda op: op.params["window"] - 1)),
    "window on every layer": ("qwen2_window", params(ATTENTION, window=7)),
    "biases forgotten": ("qwen2", without_bias),
    "biases of gate and up forgotten": ("llama_mlp_biased", without_bias_of("gate_proj")),
    "bias of down forgotten": ("llama_mlp_biased", without_bias_of("down_proj")),
    "decay from b, beta from a": (
        "qwen3_5",
        params(["delta_inputs"], a_offset=lambda op: op.params["b_offset"], b_offset=lambda op: op.params["a_offset"]),
    ),
    "gate of the gated norm misplaced": (
        "qwen3_5",
        params(["gated_norm"], z_offset=lambda op: op.params["z_offset"] - 16),
    ),
    "experts not renormalised": ("qwen3_moe", params(["route"], renormalise=False)),
    "experts renormalised": ("qwen3_moe_not_renormalised", params(["route"], renormalise=True)),
    "embedding not scaled": ("gemma3", embedding_times(1.0)),
    "embedding scaled by half a percent too much": ("gemma3", embedding_times(8.04)),
    **{f"no +1 in {name}": ("gemma3", of_norm(name, offset=0.0)) for name in SANDWICH},
    **{f"eps of {name} forgotten": ("gemma3", of_norm(name, eps=0.0)) for name in SANDWICH if "post" in name},
    "windows one too short": ("gemma3", params(ATTENTION, window=lambda op: op.window and op.window - 1)),
    "a window on the full layer": ("gemma3", params(ATTENTION, window=9)),
    "scores scaled by the size of heads": ("gemma3", params(ATTENTION, scale=32**-0.5)),
    "silu for gelu": ("gemma3", with_activation("silu")),
    "scores not capped": ("gemma2", params(ATTENTION, soft_cap=0.0)),
    "scores capped before they are scaled": ("gemma2", params(ATTENTION, soft_cap=2.5 * 24**-0.5)),
    "scores scaled by the size of heads before the cap": ("gemma2", params(ATTENTION, scale=32**-0.5)),
    "logits not capped": ("gemma2", params(["soft_cap"], cap=1e6)),
    **mistakes_gemma.OPS,
    "gelu for silu": ("llama", with_activation("gelu_tanh")),
}


@pytest.mark.parametrize("mistake", OPS)
def test_a_mistake_in_the_program_is_seen(mistake, golden, tmp_path):
    name, change = OPS[mistake]
    is_red(run(tmp_path, name, ops=change), golden, name)


def rows(part, order):
    """A change of the row order of all tensors with `part` in their names, as a wrong loader or head map would make."""
    return {part: lambda a, c: a[order(c, len(a))]}


def blocks(*sizes):
    """Row order that swaps the first two blocks of rows, of these sizes."""
    first, second = sizes
    return lambda c, n: [*range(first, first + second), *range(first), *range(first + second, n)]


def tiled(c, n):
    """Row order that gives query heads to kv heads in turn (h % G) in place of groups (h // (H / G))."""
    H, G = c["num_attention_heads"], c["num_key_value_heads"]
    return spread([h // G + h % G * (H // G) for h in range(H)], n)


def spread(heads, n):
    """Row order that takes whole heads in this order."""
    size = n // len(heads)
    return [h * size + i for h in heads for i in range(size)]


def tiled_values(c, n):
    """Row order that gives value heads to key heads in turn."""
    H, G = c["linear_num_value_heads"], c["linear_num_key_heads"]
    return spread([h // G + h % G * (H // G) for h in range(H)], n)


def interleaved(c, n):
    """Row order with rotary pairs (2i, 2i + 1) in place of (i, i + K / 2)."""
    K = 16
    return [h * K + i for h in range(n // K) for i in [*range(0, K, 2), *range(1, K, 2)]]


WEIGHTS = {
    "wrong head map": ("llama", {**rows("q_proj", tiled), "o_proj": lambda a, c: a[:, tiled(c, a.shape[1])]}),
    "wrong head map of the delta rule": (
        "qwen3_5",
        {
            **{
                k: v
                for n in ("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias")
                for k, v in rows(n, tiled_values).items()
            },
            **{
                n: lambda a, c: np.concatenate([a[:64], a[64:][tiled_values(c, len(a) - 64)]])
                for n in ("in_proj_qkv", "conv1d")
            },
            "out_proj": lambda a, c: a[:, tiled_values(c, a.shape[1])],
        },
    ),
    "rope pairs side by side": ("llama", {**rows("q_proj", interleaved), **rows("k_proj", interleaved)}),
    "gate and up swapped": ("llama", {"gate_proj": "up_proj", "up_proj": "gate_proj"}),
    "queries and keys of the delta rule swapped": (
        "qwen3_5",
        {**rows("in_proj_qkv", blocks(32, 32)), **rows("conv1d", blocks(32, 32))},
    ),
    "taps backwards": ("qwen3_5", {"conv1d": lambda a, c: a[..., ::-1]}),
    "A in place of its logarithm": ("qwen3_5", {"A_log": lambda a, c: np.exp(a)}),
    "1 + w in the gated norm": ("qwen3_5", {"linear_attn.norm": lambda a, c: a + 1}),
    "head norms of queries and keys swapped": ("qwen3", {"q_norm": "k_norm", "k_norm": "q_norm"}),
    "the two norms of a layer swapped": (
        "llama",
        {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"},
    ),
    "gate and up of experts swapped": ("qwen3_moe", {"gate_proj": "up_proj", "up_proj": "gate_proj"}),
    **{
        f"{first} and {second} swapped": ("gemma3", {first: second, second: first})
        for first, second in itertools.combinations(SANDWICH, 2)
    },
    **mistakes_gemma.WEIGHTS,
    "neighbouring experts swapped": ("qwen3_moe", {"experts.2": "experts.3", "experts.3": "experts.2"}),
}


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_a_mistake_in_the_weights_is_seen(mistake, golden, tmp_path):
    name, changes = WEIGHTS[mistake]
    arrays = tiny.tensors(CASES[name], SEED)
    changed = {
        n: a if (to := mapped(n, changes)) is None else to(a, arrays, n, tiny.text_part(CASES[name]))
        for n, a in arrays.items()
    }
    assert any(changed[n] is not arrays[n] for n in arrays)
    is_red(run(tmp_path, name, changed), golden, name)


def mapped(name, changes):
    """How a tensor is changed: the name of another tensor to take, or a function; None for no change."""
    for part, change in changes.items():
        if f".{part}." in f".{name}.":
            if isinstance(change, str):
                return lambda a, arrays, n, c: arrays[f".{n}.".replace(f".{part}.", f".{change}.").strip(".")]
            return lambda a, arrays, n, c: np.ascontiguousarray(change(a, c))
    return None


CONFIGS = {
    "llama3 scaling forgotten": ("llama_llama3", dict(rope_scaling=None)),
    "linear scaling forgotten": ("llama_linear", dict(rope_scaling=None)),
    "yarn as linear": ("qwen3_yarn_biased", dict(rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "yarn without its factor on the tables": (
        "qwen3_yarn_biased",
        dict(rope_scaling={**CASES["qwen3_yarn_biased"]["rope_scaling"], "attention_factor": 1.0}),
    ),
    "another theta": ("llama", dict(rope_theta=10000.0)),
    "rope on a layer without": ("smollm3", dict(no_rope_layers=[1] * 4)),
    "window one too long": ("mistral_window", dict(sliding_window=10)),
    "window forgotten": ("qwen2_window", dict(use_sliding_window=False)),
    "windows one too long": ("gemma3", dict(sliding_window=10)),
    "windows forgotten": ("gemma3", dict(layer_types=["full_attention"] * 3)),
    "one rope for all layers": ("gemma3", dict(rope_local_base_freq=500.0, rope_scaling=None)),
    "the two ropes swapped": (
        "gemma3",
        dict(
            rope_theta=None,
            rope_scaling=None,
            rope_parameters={
                "full_attention": {"rope_theta": 50.0},
                "sliding_attention": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.5},
            },
        ),
    ),
    "linear scaling of windows, too": (
        "gemma3",
        dict(rope_parameters={"sliding_attention": {"rope_theta": 50.0, "rope_type": "linear", "factor": 2.5}}),
    ),
    "linear scaling of the full layer forgotten": ("gemma3", dict(rope_scaling=None)),
    "rope of the first channels, not of pairs half a head apart": (
        "gemma4",
        dict(
            rope_parameters={
                **CASES["gemma4"]["rope_parameters"],
                "full_attention": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
            }
        ),
    ),
    "windows on the other layers": (
        "gemma2",
        dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "the two caps swapped": ("gemma2", dict(attn_logit_softcapping=4.0, final_logit_softcapping=2.5)),
    "one expert too few": ("qwen3_moe", dict(num_experts_per_tok=2)),
}


@pytest.mark.parametrize("mistake", CONFIGS)
def test_a_misread_config_is_seen(mistake, golden, tmp_path):
    name, changes = CONFIGS[mistake]
    arrays = tiny.tensors(CASES[name], SEED)
    is_red(run(tmp_path, name, arrays, config={**CASES[name], **changes}), golden, name)


def test_a_stale_state_slot_is_seen(golden, tmp_path):
    is_red(run(tmp_path, "qwen3_5", cuts=(11,), slots=(1, 2)), golden, "qwen3_5")


def test_unchanged_models_are_green(golden, tmp_path):
    for name in sorted({name for table in (OPS, WEIGHTS, CONFIGS) for name, _ in table.values()}):
        worst, flips = difference(run(tmp_path / name, name), golden[f"{name}.logits"])
        assert worst <= TOLERANCE and flips == 0, (name, worst)
