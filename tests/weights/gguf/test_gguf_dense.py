"""GGUF files of Phi, Mistral, Granite, OLMo and Seed-OSS compute the bits of the folders they were converted from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.registry import model_config
from lockstep.ops.attention.rope import RopeScaling, attention_factor
from tests.models import tiny
from tests.models.cases import CASES, LONGROPE
from tests.models.running import load, logits_of
from tests.weights import convert
from tests.weights.files import gguf_bytes, plain_tensors, write

Arrays = Mapping[str, np.ndarray]
SIZES = dict(
    block_count=3, context_length=256, embedding_length=64, feed_forward_length=96, attention__head_count=4,
    attention__head_count_kv=2, attention__layer_norm_rms_epsilon=0.01, rope__freq_base=500.0,
    vocab_size=96)  # fmt: skip
STEMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in ("q", "k", "v", "qkv")},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class File:
    """How a case of `CASES` is converted.

    architecture, keys: of the metadata. stems: names of a layer's tensors, as far as they are not `STEMS`. change: what
    conversion does to a tensor. extra: more tensors.
    """

    case: str
    architecture: str
    keys: Mapping[str, object] = field(default_factory=dict)
    stems: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array
    extra: Arrays = field(default_factory=dict)

    def write(self, path, arrays, **changes):
        """Writes the file; changes: of its metadata, None for a key that is left out."""
        parts = {n: a for whole, array in arrays.items() for n, a in apart(whole, array).items()}
        named = {self.name(n): np.ascontiguousarray(self.change(n, a)) for n, a in parts.items()}
        keys = {k: v for k, v in {**SIZES, **self.keys, **changes}.items() if v is not None}
        return write(
            path, gguf_bytes(convert.metadata(self.architecture, **keys), plain_tensors({**named, **self.extra}))
        )

    def name(self, name):
        """GGUF's name of a Hugging Face tensor."""
        if name in convert.WHOLE:
            return convert.WHOLE[name]
        _, _, layer, rest = name.split(".", 3)
        stem, _, suffix = rest.rpartition(".")
        return f"blk.{layer}.{ {**STEMS, **self.stems}[stem] }.{suffix}"


LISTS = {f"rope_factors_{n}.weight": np.array(LONGROPE[f"{n}_factor"], np.float32) for n in ("long", "short")}
FUSED = {"mlp.gate_up_proj": "ffn_up"}
PHI = dict(rope__dimension_count=16, rope__scaling__original_context_length=4096, attention__sliding_window=0)
# the factor of the tables is (1 + ln 8 / ln 32) ** 0.5
LONG = {**PHI, "rope__dimension_count": 12, "rope__scaling__original_context_length": 32}


def rotary(name, array, num_kv_heads=2):
    """Rows of queries and keys as conversion puts them: the two of a pair side by side."""
    heads = {"q_proj": 4, "k_proj": num_kv_heads}
    part = name.split(".")[-2]
    return convert.interleave_rotary(array, heads[part]) if part in heads else array


GROWS = dict(
    attention__key_length=32, attention__value_length=32, rope__dimension_count=32, rope__scaling__type="yarn",
    rope__scaling__factor=4.0, rope__scaling__original_context_length=9, rope__scaling__yarn_beta_fast=4.0,
    rope__scaling__yarn_beta_slow=1.0, rope__scaling__yarn_log_multiplier=1.0,
    attention__temperature_scale=0.4)  # fmt: skip
SCALES = dict(
    attention__scale=0.17, embedding_scale=3.5, residual_scale=0.6, logit_scale=0.3, rope__dimension_count=16,
    rope__scaling__finetuned=True)  # fmt: skip
OLMO_STEMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
OLMO = dict(rope__dimension_count=16)
WINDOWS = {
    **OLMO, "block_count": 4, "attention__head_count_kv": 1, "attention__sliding_window": 9,
    "attention__sliding_window_pattern": [True, True, True, False], "rope__scaling__type": "yarn",
    "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64, "rope__scaling__yarn_beta_fast": 8.0,
}  # fmt: skip
SEED = dict(attention__key_length=32, attention__value_length=32, rope__dimension_count=32, attention__head_count_kv=1)
SEED_STEMS = {"post_attention_layernorm": "post_attention_norm"}
BIASED = {**SEED, **dict.fromkeys(("attention__key_length", "attention__value_length", "rope__dimension_count"), 16)}
EXPERTS = {**SCALES, "feed_forward_length": 48, "expert_count": 6, "expert_used_count": 3}
EXPERT_STEMS = {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "gate": "ffn_gate_exps",
    "up": "ffn_up_exps",
    "block_sparse_moe.output_linear": "ffn_down_exps",
}


def apart(name, array):
    """The tensors that conversion writes of one: gate and up of experts are two."""
    if not name.endswith("input_linear.weight"):
        return {name: array}
    return {name.replace("block_sparse_moe.input_linear", part): half for part, half in halves(array)}


def halves(array):
    """The rows of gate and of up of all experts."""
    return zip(("gate", "up"), np.split(array, 2, axis=1), strict=True)


FILES = [
    File("olmo2", "olmo2", OLMO, OLMO_STEMS),
    File("olmo3", "olmo2", WINDOWS, OLMO_STEMS),
    File("seed_oss", "seed_oss", SEED, SEED_STEMS),
    File("seed_oss_all_biased", "seed_oss", {**BIASED, "attention__head_count_kv": 2}, SEED_STEMS),
    File("granite", "granite", SCALES, change=rotary),
    File("granitemoe", "granitemoe", EXPERTS, EXPERT_STEMS, rotary),
    File("ministral3", "mistral3", GROWS, change=rotary),
    File("phi3", "phi3", {**PHI, "attention__sliding_window": 9, "attention__head_count_kv": 4}, FUSED),
    File("phi3_long", "phi3", {**LONG, "rope__scaling__attn_factor": 1.6**0.5}, FUSED, extra=LISTS),
]
# a file has one theta
SAME_THETAS = {"rope_parameters": {**CASES["olmo3"]["rope_parameters"], "sliding_attention": {"rope_theta": 500.0}}}
BY_CASE = {file.case: file for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.case)
def test_a_file_computes_the_bits_of_its_folder(file, tmp_path):
    config = {**CASES[file.case], **SAME_THETAS} if file.case == "olmo3" else CASES[file.case]
    arrays = tiny.tensors(config, 3)
    folder = load(tiny.write(tmp_path / "folder", config, arrays))
    loaded = load(file.write(tmp_path / "m.gguf", arrays))
    ids = tiny.prompt(config, 40)
    assert logits_of(loaded, ids).tobytes() == logits_of(folder, ids).tobytes()


def config_of(case, path, **changes):
    """The ModelConfig of a case's file with changed metadata."""
    path = BY_CASE[case].write(path / "m.gguf", tiny.tensors(CASES[case], 3), **changes)
    return model_config(open_checkpoint(path).config)


def test_a_file_of_phi_whose_context_is_that_of_its_first_training(tmp_path):
    made = config_of("phi3_long", tmp_path, context_length=32, rope__scaling__attn_factor=1.0)
    assert made.layers[0].mixer.rope.scaling.factors == tuple(LONGROPE["short_factor"])


def test_a_file_of_phi_without_one_of_the_lists(tmp_path):
    path = tmp_path / "m.gguf"
    one = {"rope_factors_long.weight": LISTS["rope_factors_long.weight"]}
    File("phi3_long", "phi3", LONG, FUSED, extra=one).write(path, tiny.tensors(CASES["phi3_long"], 3))
    with pytest.raises(ValueError, match="'short_factor': expected a list of 6 numbers, got None"):
        model_config(open_checkpoint(path).config)


def test_a_file_of_ministral_says_how_the_tables_are_scaled(tmp_path):
    scaling = lambda weight: (
        config_of("ministral3", tmp_path, rope__scaling__yarn_log_multiplier=weight).layers[0].mixer
    )
    assert attention_factor(scaling(1.0).rope.scaling) == 1
    assert attention_factor(scaling(0.0).rope.scaling) == attention_factor(RopeScaling("yarn", 4.0))
    assert attention_factor(scaling(0.5).rope.scaling) == pytest.approx((1 + 0.1 * np.log(4)) / (1 + 0.05 * np.log(4)))


def test_a_file_of_small_in_the_architecture_of_ministral(tmp_path):
    silent = dict.fromkeys(key for key in GROWS if "scal" in key)
    made = config_of("ministral3", tmp_path, **silent)
    assert made.model_type == "mistral" and made.layers[0].mixer.growth is None and made.layers[0].window == 0


def test_a_file_of_granite_without_a_rope_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finetuned is false: Granite without a rope is not supported"):
        config_of("granite", tmp_path, rope__scaling__finetuned=False)


YARN = dict(rope__scaling__type="yarn", rope__scaling__factor=2.0, rope__scaling__original_context_length=32)


@pytest.mark.parametrize(
    "names, keys",
    [
        (["rope_freqs"], YARN),
        (["rope_freqs"], dict(rope__scaling__type="linear", rope__scaling__factor=2.0)),
        (["rope_factors_long", "rope_factors_short"], YARN),
        (["rope_factors_short"], {}),
        (["rope_freqs", "rope_factors_long", "rope_factors_short"], dict(rope__scaling__original_context_length=32)),
    ],
)
def test_factors_of_a_rope_of_another_type_are_not_left_out(names, keys, tmp_path):
    extra = {f"{name}.weight": np.ones(8, np.float32) for name in names}
    path = File("granite", "granite", SCALES, change=rotary, extra=extra).write(
        tmp_path / "m.gguf", tiny.tensors(CASES["granite"], 3), **keys
    )
    with pytest.raises(ValueError, match=f"rope.scaling.type .* beside '{names[0]}.weight'.*: expected none of these"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [5, 4097])
def test_arrays_with_too_many_numbers_are_named(length, tmp_path):
    path = BY_CASE["olmo3"].write(
        tmp_path / "m.gguf", tiny.tensors(CASES["olmo3"], 3), attention__sliding_window_pattern=[True] * length
    )
    with pytest.raises(ValueError, match=r"pattern has 4097 numbers, at most 4096|expected 4 of full"):
        model_config(open_checkpoint(path).config)
