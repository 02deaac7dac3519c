"""Folders in Mistral's own form: they equal the Hugging Face folder of the same weights, bit for bit."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from lockstep.models.checkpoint import open_checkpoint, open_config
from lockstep.models.registry import model_config
from lockstep.weights.rearranged import half_split
from lockstep.weights.safetensors import open_file
from lockstep.weights.tensor import StoredTensor
from tests.models import tiny
from tests.models.cases import case
from tests.models.running import load, logits_of
from tests.weights.files import safetensors_bytes, write, write_folder

YARN = dict(factor=4.0, original_max_position_embeddings=16, beta=8.0, alpha=1.0)
ROPE = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=1.0, rope_theta=500.0
)
UNSCALED = dict(mscale=1.0, mscale_all_dim=1.0)
SHAPES = dict(
    hidden_size="dim", num_hidden_layers="n_layers", num_attention_heads="n_heads", num_key_value_heads="n_kv_heads",
    intermediate_size="hidden_dim", rms_norm_eps="norm_eps", vocab_size="vocab_size", head_dim="head_dim",
    max_position_embeddings="max_position_embeddings", tie_word_embeddings="tied_embeddings",
)  # fmt: skip
MISTRAL = case("mistral", eos_token_id=None, sliding_window=None, head_dim=32, rope_theta=500.0)
# {name: (config of the twin, keys of params.json)}
FORMS = {
    "mistral": (MISTRAL, dict(rope_theta=500.0)),
    "window": (MISTRAL | dict(sliding_window=9, rope_theta=10000.0), dict(sliding_window=9)),
    "tied": (MISTRAL | dict(tie_word_embeddings=True), dict(rope_theta=500.0)),
    "yarn": (
        MISTRAL | dict(rope_theta=None, rope_parameters=ROPE | UNSCALED),
        dict(rope_theta=500.0, yarn=YARN | dict(apply_scale=False), llama_4_scaling=None),
    ),
    "scaled": (
        MISTRAL | dict(rope_theta=None, rope_parameters=ROPE),
        dict(rope_theta=500.0, yarn=YARN | dict(apply_scale=True)),
    ),
    "ministral3": (
        case(
            "ministral3", eos_token_id=None, head_dim=32, rope_theta=None,
            rope_parameters=ROPE | UNSCALED | dict(llama_4_scaling_beta=0.1),
        ),
        dict(
            rope_theta=500.0, yarn=YARN, llama_4_scaling=dict(original_max_position_embeddings=16, beta=0.1),
            vision_encoder=dict(hidden_size=8), model_type="transformer",
        ),
    ),
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
}  # fmt: skip


def native_name(name):
    for old, new in LAYER.items():
        name = name.replace(old, new)
    return name


def interleaved(rows, num_heads):
    """Rows of pairs half a head apart, with the two of each pair side by side; by a loop over heads and pairs."""
    height = len(rows) // num_heads
    order = [
        head * height + pair + half
        for head in range(num_heads)
        for pair in range(height // 2)
        for half in (0, height // 2)
    ]
    return rows[order]


def native_tensors(config, tensors):
    heads = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    made = {}
    for name, array in tensors.items():
        count = next((count for end, count in heads.items() if name.endswith(end)), None)
        made[native_name(name)] = array if count is None else interleaved(array, count)
    return made


def native_params(config, **more):
    return {new: config[old] for old, new in SHAPES.items() if config.get(old) is not None} | more


def write_native(folder, params, tensors, parts=1):
    """A folder of Mistral's form, in so many files."""
    folder.mkdir(exist_ok=True)
    write(folder / "params.json", json.dumps(params))
    names = sorted(tensors)
    for part in range(parts):
        name = f"consolidated-{part + 1:05d}-of-{parts:05d}" if parts > 1 else "consolidated"
        write(folder / f"{name}.safetensors", safetensors_bytes({k: tensors[k] for k in names[part::parts]}))
    return folder


def bf16(tensors):
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}


def twins(tmp_path, form, parts=1):
    """(the native folder, its Hugging Face twin)."""
    config, more = FORMS[form]
    tensors = bf16(tiny.tensors(config, 5))
    native = native_tensors(config, tensors) | {"vision_encoder.x.weight": np.ones((2, 2), np.float32)}
    folder = write_native(tmp_path / "native", native_params(config, **more), native, parts)
    return folder, write_folder(tmp_path / "twin", tensors, **config)


def same(one, other):
    """Whether two checkpoints have the same numbers and the same tensors, bit for bit."""
    assert model_config(one.config) == model_config(other.config)
    assert sorted(one.tensors) == sorted(other.tensors)
    for name, tensor in other.tensors.items():
        found = one.tensors[name]
        assert (found.name, found.format, found.shape) == (name, tensor.format, tensor.shape), name
        assert one.tensors.info[name] == other.tensors.info[name]
        assert found.read().tobytes() == tensor.read().tobytes(), name
    return True


@pytest.mark.parametrize("form", FORMS)
def test_a_native_folder_equals_its_twin(form, tmp_path):
    folder, twin = twins(tmp_path, form)
    assert same(open_checkpoint(folder), open_checkpoint(twin))


def test_logits_are_those_of_the_twin(tmp_path):
    folder, twin = twins(tmp_path, "mistral")
    prompt = tiny.prompt(FORMS["mistral"][0], 40, 5)
    assert logits_of(load(folder), prompt).tobytes() == logits_of(load(twin), prompt).tobytes()


@pytest.mark.parametrize("with_index", [True, False])
def test_several_files(with_index, tmp_path):
    folder, twin = twins(tmp_path, "mistral", parts=3)
    files = sorted(folder.glob("*.safetensors"))
    if with_index:
        weight_map = {name: file.name for file in files for name in open_file(file).infos}
        write(folder / "consolidated.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    assert same(open_checkpoint(folder), open_checkpoint(twin))
    files[1].unlink()
    with pytest.raises(
        ValueError, match="consolidated-00002-of-00003" if with_index else "one .safetensors file, found"
    ):
        open_checkpoint(folder)


def test_one_file_of_the_folder(tmp_path):
    folder, twin = twins(tmp_path, "tied")
    assert same(open_checkpoint(folder / "consolidated.safetensors"), open_checkpoint(twin))


def test_files_in_hugging_faces_form_win(tmp_path):
    folder, twin = twins(tmp_path, "mistral")
    shutil.copytree(twin, folder, dirs_exist_ok=True)
    write(folder / "params.json", "{}")
    write(folder / "consolidated.safetensors", b"")
    assert same(open_checkpoint(folder), open_checkpoint(twin))


def test_8_bit_floats(tmp_path):
    config, more = FORMS["ministral3"]
    tensors, twin, native = bf16(tiny.tensors(config, 6)), {}, {}
    for name, array in tensors.items():
        twin[name] = array
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            twin[name] = array.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
            twin |= {f"{module}.weight_scale_inv": np.array(0.75, ml_dtypes.bfloat16)}
            twin |= {f"{module}.activation_scale": np.array(0.5, ml_dtypes.bfloat16)}
    for name, array in native_tensors(config, twin).items():
        native[name.replace("weight_scale_inv", "qscale_weight").replace("activation_scale", "qscale_act")] = array
    params = native_params(config, **more, quantization=dict(qformat_weight="fp8_e4m3", qscheme_act="TENSOR"))
    one = write_native(tmp_path / "native", params, native)
    other = write_folder(tmp_path / "twin", twin, **config, quantization_config=dict(quant_method="fp8"))
    assert same(open_checkpoint(one), open_checkpoint(other))


@pytest.mark.parametrize("num_heads", [1, 3])
def test_rows_in_pieces(num_heads):
    rows = np.arange(num_heads * 8 * 5, dtype=np.float32).reshape(-1, 5)
    tensor = half_split(StoredTensor("q", "f32", rows.shape, interleaved(rows, num_heads)), num_heads)
    for cut in (slice(None), slice(0, 1), slice(3, 7), slice(len(rows) - 3, len(rows) + 4)):
        assert (tensor.read(cut) == rows[cut]).all()


@pytest.mark.parametrize(
    "more, match",
    [
        (dict(moe=dict(num_experts=8)), r"key 'moe' \(value .*\) is not supported, and it may change the result"),
        (dict(q_lora_rank=8), r"key 'q_lora_rank' \(value 8\) is not supported"),
        (dict(model_type="mamba"), "key 'model_type': 'mamba' is not supported, only 'transformer'"),
        (dict(use_biases=True), "key 'use_biases': True is not supported, only False"),
        (dict(sliding_window=[None, 8]), r"key 'sliding_window': a list is not supported, got \[None, 8\]"),
        (dict(yarn=YARN | dict(gamma=1)), "key 'yarn': expected an object of alpha, apply_scale, beta, factor, "),
        (dict(yarn=[1]), "key 'yarn': expected an object"),
        (dict(llama_4_scaling=dict(beta=0.1)), "key 'llama_4_scaling' is not supported without 'yarn'"),
        (
            dict(yarn=YARN, llama_4_scaling=dict(beta=0.1, original_max_position_embeddings=17)),
            "key 'llama_4_scaling': expected beta, and the original_max_position_embeddings of yarn",
        ),
        (dict(quantization=dict(qformat_weight="nvfp4")), "key 'quantization': only fp8_e4m3 with scales of a tensor"),
        (dict(quantization=[3]), "config key 'quantization_config': expected an object"),
        (dict(quantization=dict(quant_method="bnb")), "quant_method 'bnb' is not supported"),
        (dict(n_heads=3, n_kv_heads=3), "are no pairs of rows of 3 heads"),
        (dict(n_heads="4"), "expected a number, got '4'"),
        (dict(n_heads=0), "expected 1 to"),
    ],
)
def test_what_is_not_supported_is_named(more, match, tmp_path):
    config, form = FORMS["mistral"]
    tensors = native_tensors(config, bf16(tiny.tensors(config, 5)))
    folder = write_native(tmp_path / "native", native_params(config, **form) | more, tensors)
    with pytest.raises(ValueError, match=match):
        opened = open_checkpoint(folder)
        model_config(opened.config)
        [opened.tensors[name] for name in opened.tensors]


@pytest.mark.parametrize(
    "name", ["layers.0.attention.wx.weight", "eagle_linear.weight", "layers.0.moe.gate.weight", "output"]
)
def test_unknown_tensors_are_named(name, tmp_path):
    folder = write_native(tmp_path / "native", native_params(MISTRAL), {name: np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=f"tensor '{name}' is not one that a model of params.json is known to have"):
        open_checkpoint(folder)


def test_params_without_weights_are_shown_as_the_config_that_they_are(tmp_path):
    config, more = FORMS["yarn"]
    write(tmp_path / "params.json", json.dumps(native_params(config, **more)))
    opened = open_config(tmp_path)
    assert model_config(opened.config) == model_config(config)
    assert {name: info.shape for name, info in opened.tensors.info.items()} == tiny.shapes(config)
