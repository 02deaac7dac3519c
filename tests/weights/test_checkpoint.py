"""Opening checkpoints of every container, and the memory that opening may take."""

import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lockstep.formats import Q4_0, Q8_0
from lockstep.models.checkpoint import open_checkpoint, open_config
from lockstep.weights.tensor import StoredTensor
from tests.weights.files import STRING, UINT32, gguf_bytes, plain_tensors, safetensors_bytes, write, write_folder

WEIGHTS = {"model.norm.weight": np.arange(4, dtype=np.float32)}


def test_a_folder_and_a_file_in_it(tmp_path):
    folder = write_folder(tmp_path / "m", WEIGHTS, hidden_size=4)
    write(folder / "generation_config.json", '{"eos_token_id": [1, 2]}')
    for path in (folder, str(folder), folder / "model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == Path(path) and checkpoint.metadata == {}
        assert checkpoint.config == {"model_type": "qwen3", "hidden_size": 4}
        assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
        assert (checkpoint.tensors["model.norm.weight"].data == WEIGHTS["model.norm.weight"]).all()


def test_a_tensor_that_is_not_there(tmp_path):
    tensors = open_checkpoint(write_folder(tmp_path / "m", WEIGHTS)).tensors
    assert "lm_head.weight" not in tensors and len(tensors) == 1
    with pytest.raises(KeyError):
        tensors["lm_head.weight"]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder, a \.safetensors file or a \.gguf file"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="no such file"):
        open_checkpoint(tmp_path / "absent.gguf")
    write(tmp_path / "model.safetensors", safetensors_bytes(WEIGHTS))
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        open_checkpoint(tmp_path)
    write(tmp_path / "config.json", "[]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, found list"):
        open_checkpoint(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs(name, tmp_path):
    write(write_folder(tmp_path / "m", WEIGHTS) / name, POINTER)
    with pytest.raises(ValueError, match=rf"{name}: a pointer of Git LFS in place of the file, which `git lfs pull`"):
        open_checkpoint(tmp_path / "m")


def test_a_gguf_file_that_is_a_pointer(tmp_path):
    with pytest.raises(ValueError, match=r"m\.gguf: a pointer of Git LFS"):
        open_checkpoint(write(tmp_path / "m.gguf", POINTER))


def test_a_file_that_was_not_downloaded_whole(tmp_path):
    path = write_folder(tmp_path / "m", WEIGHTS) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="ends at byte 16 of 15 bytes of data: the file is cut off, as by a download"):
        open_checkpoint(path)
    head = {"general.architecture": (STRING, "llama")}
    file = write(tmp_path / "m.gguf", gguf_bytes(head, plain_tensors({"output_norm.weight": np.ones(64, np.float32)})))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"bytes of the file: the file is cut off, as by a download"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    "names, said",
    [
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin: such files may run code when they"),
        (["consolidated.00.pth"], "consolidated.00.pth: such files may run code"),
        (["a-mmproj-F16.gguf", "b-Q4_K_M.gguf"], "b-Q4_K_M.gguf: name that file in place of its folder"),
    ],
)
def test_weights_in_other_forms_are_named(names, said, tmp_path):
    write(tmp_path / "config.json", "{}")
    for name in names:
        write(tmp_path / name, "x")
    with pytest.raises(ValueError, match=f"found none, but {said}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_alone_and_beside_its_model(beside, tmp_path):
    folder = write_folder(tmp_path / "m", WEIGHTS)
    write(folder / "adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    if not beside:
        (folder / "config.json").unlink()
    said = r"adapter_config\.json: adapters are not supported, got one of type 'LORA' for 'org/base': merge it"
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match=said):
            open_checkpoint(path)
    with pytest.raises(ValueError, match=said):
        open_config(folder)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("adapter", "merge it into its base model"),
        ("mmproj", "only the text part is read"),
        ("imatrix", "no weights"),
        ("tokens", "nothing else is read"),
    ],
)
def test_gguf_files_that_are_no_models(kind, said, tmp_path):
    metadata = {"general.architecture": (STRING, "llama"), "general.type": (STRING, kind)}
    with pytest.raises(ValueError, match=f"general.type is '{kind}', expected 'model': .*{said}"):
        open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes(metadata, plain_tensors(WEIGHTS))))


def test_opening_does_not_read_the_weights(tmp_path):
    """A sparse file of 8 GB, with only its header on disk: opening takes almost no memory."""
    rows = 1 << 20
    norm = ("f32", (4,), bytes(16))
    metadata = {"general.architecture": (STRING, "llama")}
    for key, value in {
        "block_count": 1,
        "embedding_length": 2048,
        "attention.head_count": 16,
        "context_length": 64,
    }.items():
        metadata[f"llama.{key}"] = (UINT32, value)
    metadata["llama.attention.layer_norm_rms_epsilon"] = (6, 1e-6)
    content = gguf_bytes(metadata, {"output_norm.weight": norm, "token_embd.weight": ("f32", (rows, 2048), b"")})
    path = write(tmp_path / "m.gguf", content)
    os.truncate(path, len(content) + rows * 2048 * 4)
    tracemalloc.start()
    tensor = open_checkpoint(path).tensors["model.embed_tokens.weight"]
    assert tensor.data.nbytes == 8 << 30 and tensor.to_f32(slice(7, 9)).shape == (2, 2048)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_rows_of_every_format():
    weights = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    stored = {
        "f32": weights,
        "bf16": weights.astype(ml_dtypes.bfloat16),
        "f8_e4m3": weights.astype(ml_dtypes.float8_e4m3fn),
        "q8_0": Q8_0.quantize(weights),
        "q4_0": Q4_0.quantize(weights),
    }
    for format, data in stored.items():
        tensor = StoredTensor("w", format, (5, 64), data)
        whole = tensor.to_f32()
        assert whole.dtype == np.float32 and whole.shape == (5, 64)
        assert (tensor.to_f32(slice(1, 4)) == whole[1:4]).all()
    assert StoredTensor("w", "i8", (2,), np.int8([-1, 5])).to_f32().tolist() == [-1, 5]


def test_a_gguf_file_carries_its_metadata(tmp_path):
    metadata = {"general.architecture": (STRING, "llama"), "tokenizer.chat_template": (STRING, "{{ 1 }}")}
    for key, value in {
        "block_count": 1,
        "embedding_length": 4,
        "attention.head_count": 1,
        "context_length": 64,
    }.items():
        metadata[f"llama.{key}"] = (UINT32, value)
    metadata["llama.attention.layer_norm_rms_epsilon"] = (6, 1e-6)
    tensors = plain_tensors(
        {"token_embd.weight": np.ones((3, 4), np.float32), "output_norm.weight": np.ones(4, np.float32)}
    )
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes(metadata, tensors)))
    assert checkpoint.metadata["tokenizer.chat_template"] == "{{ 1 }}"
    assert checkpoint.config["rms_norm_eps"] == 1e-6 and checkpoint.config["rope_theta"] == 10000.0


PEERS = Path(os.environ.get("PEERS_DIR", "")) / "models"


@pytest.mark.skipif(not os.environ.get("PEERS_DIR"), reason="PEERS_DIR does not name a folder with converted models")
@pytest.mark.parametrize("model", ["qwen3-0.6b", "qwen3.5-0.8b", "llama-3.2-1b"])
@pytest.mark.parametrize("form", ["BF16", "Q8_0", "Q4_0-pure"])
def test_models_converted_by_llama_cpp(model, form):
    path = PEERS / f"{model}-{form}.gguf"
    if not path.is_file():
        pytest.skip(f"{path.name} has not been made")
    expected, found = open_checkpoint(PEERS / f"{model}-hf").tensors, open_checkpoint(path).tensors
    assert set(found) == set(expected)
    quantize = {"q8_0": Q8_0.quantize, "q4_0": Q4_0.quantize}
    for name in expected:
        wanted, tensor = expected[name].to_f32(slice(0, 512)), found[name]
        if tensor.format in quantize:
            assert (tensor.data[:512] == quantize[tensor.format](wanted)).all(), name
        elif "norm" in name and "3.5" in model and "linear_attn" not in name:
            assert (tensor.to_f32(slice(0, 512)) + np.float32(1) == wanted + np.float32(1)).all(), name
        else:
            assert (tensor.to_f32(slice(0, 512)) == wanted).all(), name
