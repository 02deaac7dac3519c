"""Quantized folders: decoded weights equal those of the documented layout, and whole models equal their twins."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from lockstep.formats import BLOCK_FORMATS
from lockstep.formats.groups.rows import format_of
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights.folders.folder import unquantized
from lockstep.weights.rearranged import ScatteredColumns
from lockstep.weights.safetensors import open_file
from lockstep.weights.tensor import merge
from tests.models import tiny
from tests.models.cases import case
from tests.models.running import load, logits_of
from tests.weights.files import safetensors_bytes, write, write_folder
from tests.weights.folders import forms
from tests.weights.folders.forms import AWQ, FORMS, FP8, GPTQ, GROUP, MLX, compressed, quantized_model, scheme

N, K = 40, 192
NAME = "model.layers.0.mlp.up_proj"
CONFIG = case("qwen3", hidden_size=128, intermediate_size=192, tie_word_embeddings=False)


def opened(tmp_path, config, parts, name=NAME):
    """The tensors of a file with one layer's parts."""
    path = write(tmp_path / "m.safetensors", safetensors_bytes({f"{name}.{k}": v for k, v in parts.items()}))
    key = "quantization_config" if "quant_method" in config else "quantization"
    return unquantized({key: config}, merge([open_file(path)]))


def layer(form, seed=0):
    """(config, parts, weights) of a form."""
    config, write_parts, _ = FORMS[form]
    return config, *write_parts(np.random.default_rng(seed), N, K)


def same(found, expected):
    """Bit for bit, but for the sign of zeros, which a sum does not keep."""
    return found.shape == expected.shape and (found + 0.0).tobytes() == (expected + 0.0).tobytes()


def kept_format(form):
    """The format as which a form's weights are read."""
    config, _, format = FORMS[form]
    group = 32 if "32" in str(config.get("group_size")) else GROUP
    return format if isinstance(format, str) else format_of(format, group).name


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_layout(form, tmp_path):
    config, parts, weights = layer(form)
    tensors = opened(tmp_path, config, parts)
    assert list(tensors) == [f"{NAME}.weight"]
    tensor = tensors[f"{NAME}.weight"]
    kept = tensor.sorted if isinstance(tensor, ScatteredColumns) else tensor
    assert kept.format == tensors.info[tensor.name].format == kept_format(form)
    assert kept.shape == tensor.shape == (N, K) and kept.data.nbytes == tensors.info[tensor.name].num_bytes
    assert same(tensor.to_f32(), weights)
    for rows in (slice(3, 21), slice(37, 50), slice(0, 1)):
        assert same(tensor.to_f32(rows), weights[rows])


IDS = list(range(3, 40))
TWINS = ["awq", "gptq", "gptq in order of activations", "packed with zero points", "int", "mlx", "fp8", "nvfp4"]


@pytest.mark.parametrize("form", TWINS)
def test_a_model_equals_its_dequantized_twin(form, tmp_path):
    quantized, twin = quantized_model(form, CONFIG, tmp_path)
    expected = logits_of(load(twin), IDS)
    assert logits_of(load(quantized), IDS).tobytes() == expected.tobytes()
    model = load(quantized, "auto")
    kept = {weight.format for weight in model.recorded.weights()}
    assert kept_format(form) in kept and kept & set(BLOCK_FORMATS) <= {kept_format(form), format_of(4, GROUP).name}
    noise = np.square(logits_of(model, IDS) - expected).mean() / np.square(expected).mean()
    assert noise < 0.05**2  # activations are rounded to 8 bits


def test_stacked_experts_of_mlx(tmp_path):
    rng = np.random.default_rng(2)
    each = [forms.mlx(4)(rng, N, K) for _ in range(3)]
    parts = {suffix: np.stack([one[suffix] for one, _ in each]) for suffix in ("weight", "scales", "biases")}
    tensors = opened(tmp_path, MLX, parts, "model.layers.0.mlp.switch_mlp.up_proj")
    assert len(tensors) == 3
    for e, (_, weights) in enumerate(each):
        assert same(tensors[f"model.layers.0.mlp.experts.{e}.up_proj.weight"].to_f32(slice(2, 30)), weights[2:30])


def test_layers_with_settings_of_their_own(tmp_path):
    parts, weights = forms.mlx(8, 32)(np.random.default_rng(3), N, K)
    tensors = opened(tmp_path, MLX | {NAME: {"bits": 8, "group_size": 32}}, parts)
    assert same(tensors[f"{NAME}.weight"].to_f32(), weights)


def test_layers_that_are_left_out_keep_their_weights(tmp_path):
    """Whatever the list of exceptions says: names of tensors decide."""
    config, parts, _ = layer("packed")
    config = config | {"ignore": ["re:.*gate", "model.layers"]}
    parts = {f"{NAME}.{k}": v for k, v in parts.items()} | {"lm_head.weight": np.ones((4, 32), np.float32)}
    path = write(tmp_path / "m.safetensors", safetensors_bytes(parts))
    tensors = unquantized({"text_config": {"quantization_config": config}}, merge([open_file(path)]))
    assert set(tensors) == {"lm_head.weight", f"{NAME}.weight"} and tensors["lm_head.weight"].format == "f32"


def changed(form, **changes):
    """A form with other parts: arrays, or None for one that is missing."""
    config, parts, _ = layer(form)
    return config, {k: v for k, v in (parts | changes).items() if v is not None}


def blocks_of_floats(block):
    """A quantization_config of compressed-tensors for floats of 8 bits with a scale for each block."""
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": block}
    return compressed({"weights": weights}, format="float-quantized")


@pytest.mark.parametrize("block", [[32, 48], "32x48"])
def test_blocks_of_floats_have_their_sizes_in_a_list_or_a_text(block, tmp_path):
    _, parts, weights = layer("fp8")
    parts["weight_scale"] = parts.pop("weight_scale_inv")
    assert same(opened(tmp_path, blocks_of_floats(block), parts)[f"{NAME}.weight"].to_f32(), weights)


def test_a_block_that_is_larger_than_the_weight_takes_no_memory(tmp_path):
    """Scales are looked up by column: one for a million columns is not repeated a million times."""
    parts = {
        "weight": np.ones((256, K), "f4").astype(ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.ones((1, 1), "f4"),
    }
    tensor = opened(tmp_path, FP8 | {"weight_block_size": [1 << 20] * 2}, parts)[f"{NAME}.weight"]
    tracemalloc.start()
    try:
        assert (tensor.read() == 1).all() and tracemalloc.get_traced_memory()[1] < 32 * 256 * K
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("keys", [("format",), ("format", "checkpoint_format")])
def test_the_version_of_gptq_may_stand_under_either_key(keys, tmp_path):
    config, parts, weights = layer("gptq_v2 of 2 bits")
    config = {key: value for key, value in config.items() if key != "checkpoint_format"} | dict.fromkeys(
        keys, "gptq_v2"
    )
    assert same(opened(tmp_path, config, parts)[f"{NAME}.weight"].to_f32(), weights)


def test_patterns_of_layers_that_gptq_left_alone(tmp_path):
    config, parts, weights = layer("gptq")
    found = opened(tmp_path, config | {"dynamic": {"-:.*lm_head.*": {}}}, parts)
    assert same(found[f"{NAME}.weight"].to_f32(), weights)


def test_biases_of_zeros_that_no_layer_has_are_left_alone(tmp_path):
    """GPTQ's tools write one for every layer; published files of Qwen2.5 have them."""
    quantized, twin = quantized_model("gptq", CONFIG, tmp_path)
    path, expected = quantized / "model.safetensors", logits_of(load(twin), IDS)
    tensors = {name: tensor.read() for name, tensor in merge([open_file(path)]).items()}
    bias = np.zeros(tiny.tensors(CONFIG, 5)[f"{NAME}.weight"].shape[0], np.float16)
    path.write_bytes(safetensors_bytes({**tensors, f"{NAME}.bias": bias}))
    assert logits_of(load(quantized), IDS).tobytes() == expected.tobytes()
    bias[7] = 1
    path.write_bytes(safetensors_bytes({**tensors, f"{NAME}.bias": bias}))
    with pytest.raises(ValueError, match=r"up_proj.bias' .* is not used by a model as its config describes it"):
        load(quantized)


ORDER = {"g_idx": (np.arange(K) % 4).astype(np.int32)}
FIXED = {"input_activations": {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor"}}
BAD = {
    "a group beside one scale for a row": (
        changed("int", weight_g_idx=np.full(K, 7, np.int32)),
        "weight_g_idx': expected groups 0 to 0, found 7 to 7",
    ),
    "a group that does not exist": (changed("gptq", **ORDER), r"up_proj.g_idx': expected groups 0 to 2, found 0 to 3"),
    "a group that does not exist, packed": (
        changed("packed", weight_g_idx=ORDER["g_idx"] - 1),
        "weight_g_idx': expected groups 0 to 2, found -1 to 2",
    ),
    "floats without a global scale": (changed("nvfp4", weight_global_scale=None), "weight_global_scale' is missing"),
    "floats in groups of 32": (
        changed("nvfp4", weight_scale=np.ones((N, K // 32), "f4").astype(ml_dtypes.float8_e4m3fn)),
        r"weight_scale': expected f8_e4m3 \[40, 12\]",
    ),
    "floats in rows of half a block": (
        (forms.FOUR_BITS, forms.nvfp4(np.random.default_rng(0), N, 96)[0]),
        "weight_packed': a row of 96 weights is not a whole number of blocks of 64",
    ),
    "a lying group": (
        (AWQ | {"group_size": 32}, layer("awq")[1]),
        r"scales': expected f32 or f16 or bf16 \[6, 40\], found",
    ),
    "a group that is too large": (
        (GPTQ | {"group_size": 128}, layer("gptq")[1]),
        "group_size 128 does not divide rows",
    ),
    "no group": ((GPTQ | {"group_size": 0}, layer("gptq")[1]), "group_size 0 does not divide"),
    "a huge group": ((GPTQ | {"group_size": 10**9}, layer("gptq")[1]), "key 'group_size': expected an integer"),
    "small groups": (
        (MLX | {"group_size": 16}, forms.mlx(4, 16)(np.random.default_rng(0), N, K)[0]),
        "groups of 16 are not",
    ),
    "bits": ((GPTQ | {"bits": 3}, layer("gptq")[1]), "key 'bits': expected 2 or 4 or 8, got 3"),
    "lying bits": (
        (MLX | {"bits": 8}, layer("mlx")[1]),
        r"scales': expected f32 or f16 or bf16 \[40, 1\]|not groups of 64",
    ),
    "another version": ((AWQ | {"version": "gemv"}, layer("awq")[1]), "key 'version': 'gemv' is not supported, only"),
    "no scales": (changed("awq", scales=None), r"up_proj.scales' is missing"),
    "zero points of another shape": (
        changed("gptq", qzeros=np.zeros((3, 4), np.int32)),
        r"qzeros': expected i32 or u32",
    ),
    "floats as codes": (changed("gptq", qweight=np.zeros((24, 40), np.float32)), "qweight': expected i32 or u32"),
    "no quantized layer": ((GPTQ, {"weight": np.zeros((2, 2), np.float32)}), "no tensor is named '...qweight'"),
    "an unknown method": (({"quant_method": "quip"}, {"weight": np.zeros((2, 2), np.float32)}), "quant_method 'quip'"),
    "a lying shape": (
        changed("packed", weight_shape=np.array([N, 10**12])),
        r"weight_shape': \[40, 1000000000000\] is not",
    ),
    "another scheme": (
        (compressed(scheme(4, 32)), layer("packed")[1]),
        "4 bits in groups of 64, symmetric True, which none",
    ),
    "a scheme without zero points": (
        (compressed(scheme(4, GROUP)), layer("packed with zero points")[1]),
        "symmetric False",
    ),
    "no groups of layers": ((compressed(), layer("packed")[1]), "key 'config_groups'"),
    "activations on a fixed grid": ((compressed(scheme(8, **FIXED)), layer("int")[1]), "key 'dynamic': False is not"),
    "a cache on a grid": (
        (compressed(scheme(4, GROUP)) | {"kv_cache_scheme": {"num_bits": 8}}, layer("packed")[1]),
        "kv_cache",
    ),
    "a rotation": (
        (compressed(scheme(4, GROUP)) | {"transform_config": {"a": 1}}, layer("packed")[1]),
        "transform_config",
    ),
    "another packing": ((compressed(scheme(4, 16), format="mxfp4-pack-quantized"), layer("packed")[1]), "key 'format'"),
    "scales of other blocks": (
        (FP8 | {"weight_block_size": [32, 32]}, layer("fp8")[1]),
        r"of one of the shapes \[\], .*found f32 \[2, 4\]",
    ),
    "blocks of nothing": (
        (FP8 | {"weight_block_size": [0, 1]}, layer("fp8")[1]),
        "'weight_block_size': expected two sizes",
    ),
    "floats without a scale": (changed("fp8", weight_scale_inv=None), "weight_scale_inv' is missing"),
    "another packing of gptq": (
        (GPTQ | {"format": "marlin"}, layer("gptq")[1]),
        "key 'format': 'marlin' is not supported, only 'gptq' or 'gptq_v2'",
    ),
    "two packings of gptq": (
        (GPTQ | {"format": "gptq_v2", "checkpoint_format": "gptq"}, layer("gptq")[1]),
        "keys 'checkpoint_format' and 'format': 'gptq' is not 'gptq_v2'",
    ),
    "gptq with settings of single layers": (
        (GPTQ | {"dynamic": {"-:lm_head": {}, "+:.*down.*": {"bits": 8}}}, layer("gptq")[1]),
        r"key 'dynamic': '\+:\.\*down\.\*' is not supported",
    ),
    "marlin": ((GPTQ | {"is_marlin_format": True}, layer("gptq")[1]), "'is_marlin_format': True is not supported"),
    "another packing of awq": ((AWQ | {"format": "gemv"}, layer("awq")[1]), "key 'format': 'gemv' is not supported"),
    "scales of another type": (
        changed("fp8", weight_scale_inv=np.ones((2, 4), np.uint8)),
        r"expected f32 or f16 or bf16 or f8_e8m0 of one of the shapes .*, found u8 \[2, 4\]",
    ),
    "blocks in words": ((blocks_of_floats("2:4"), layer("fp8")[1]), "'block_structure': expected two sizes, got '2:4'"),
    "another mode": ((MLX | {"mode": "nvfp4"}, layer("mlx")[1]), "key 'mode': 'nvfp4' is not supported"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named(what, tmp_path):
    (config, parts), words = BAD[what]
    with pytest.raises(ValueError, match=words):
        opened(tmp_path, config, parts)


def test_a_folder_is_named_in_its_errors(tmp_path):
    folder = write_folder(
        tmp_path / "model", {"w": np.zeros((2, 2), np.float32)}, quantization_config={"quant_method": 7}
    )
    with pytest.raises(ValueError, match=r"model: config key 'quantization_config': quant_method 7 is not supported"):
        open_checkpoint(folder)


def test_a_scale_that_is_infinite_is_named_while_packing(tmp_path):
    quantized, _ = quantized_model("awq", CONFIG, tmp_path)
    path = quantized / "model.safetensors"
    tensors = {name: tensor.data.copy() for name, tensor in merge([open_file(path)]).items()}
    tensors[f"{NAME}.scales"][0, 3] = np.inf
    path.write_bytes(safetensors_bytes(tensors))
    with pytest.raises(ValueError, match=r"up_proj.weight': expected finite block scales"):
        logits_of(load(quantized, "auto"), IDS)
