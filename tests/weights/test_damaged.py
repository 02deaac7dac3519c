"""Damage that no header shows: NaN weights anywhere, and truncation after a file was opened."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from lockstep.engine.request import SamplingParams
from lockstep.formats import BLOCK_FORMATS, Q8_0
from lockstep.formats.pack import pack
from lockstep.llm import LLM
from lockstep.models.checkpoint import open_checkpoint
from lockstep.ops.elementwise.embed import raw_bytes
from lockstep.runtime.program import Weight
from lockstep.weights import finite
from lockstep.weights.store import PackedStore
from lockstep.weights.tensor import StoredTensor
from tests.kernels import shared_kernels
from tests.models import tiny
from tests.models.cases import CASES
from tests.weights.files import write_folder

WEIGHTS = np.random.default_rng(1).standard_normal((70, 256)).astype(np.float32)
QWEN3 = CASES["qwen3"]


def table(format):
    """A valid matrix in a format, 70 rows of 256."""
    if format in BLOCK_FORMATS:
        block = BLOCK_FORMATS[format]
        shape = 70, 256 // block.block_size, block.block_bytes
        blocks = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
        for at, kind in block.scale_fields:
            blocks[..., at + kind.itemsize - 1] &= 0x3B
        data = blocks.reshape(70, -1)
    else:
        data = WEIGHTS.astype({"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[format])
    return StoredTensor("model.embed_tokens.weight", format, (70, 256), data)


def spoil(tensor, row, column, bits):
    """Overwrites one float of a plain matrix, or the last scale of a block."""
    raw = tensor.data.view(np.uint8).reshape(70, -1)
    size = {"f32": 4, "f16": 2, "bf16": 2}.get(tensor.format)
    block = BLOCK_FORMATS.get(tensor.format)
    at = column * size if size else block.block_bytes * column + block.scale_fields[-1][0]
    raw[row, at : at + bits.nbytes] = np.frombuffer(bits.tobytes(), np.uint8)


@pytest.mark.parametrize("format", ["f32", "f16", "bf16", *BLOCK_FORMATS])
@pytest.mark.parametrize("negative", [False, True])
def test_a_bad_place_of_a_table_is_named(format, negative, monkeypatch):
    monkeypatch.setattr(finite, "PIECE_BYTES", 3000)
    good = table(format)
    assert (finite.finite_bytes(good) == good.data.view(np.uint8).reshape(70, -1)).all()
    plain = format not in BLOCK_FORMATS
    dtype = table(format).data.dtype if plain else BLOCK_FORMATS[format].scale_fields[-1][1]
    column = 0 if not plain and BLOCK_FORMATS[format].block_size == 256 else 1
    for value in (np.inf, np.nan):
        bad = table(format)
        spoil(bad, 41, column, np.array([-value if negative else value], dtype))
        what = "weights" if plain else "block scales"
        place = rf"\[41, {column}(, 3)?\]"  # NVFP4 has four scales in a block
        with pytest.raises(ValueError, match=f"'model.embed_tokens.weight': expected finite {what}.*{place}"):
            raw_bytes(Weight("embed", format, (70, 256), (bad,)))


def test_the_largest_and_smallest_numbers_are_finite():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        limits = ml_dtypes.finfo(dtype)
        values = np.array([[limits.max, limits.min, limits.smallest_subnormal, -0.0]], dtype)
        format = {4: "f32"}.get(values.itemsize, "f16" if dtype is np.float16 else "bf16")
        finite.finite_bytes(StoredTensor("w", format, values.shape, values))


def test_a_large_table_is_checked_in_pieces_of_the_right_row():
    bad = table("bf16")
    bad.data[69, 255] = np.nan
    with pytest.raises(ValueError, match=r"\[69, 255\]"):
        finite.finite_bytes(bad)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight",
                                  "model.layers.1.mlp.up_proj.weight"])  # fmt: skip
def test_a_model_with_a_nan_is_refused_and_the_tensor_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(shared_kernels(tmp_path / "cache")))
    arrays = tiny.tensors(QWEN3, 3)
    arrays[name].flat[7] = np.nan
    folder = tiny.write(tmp_path / "m", QWEN3, arrays)
    for _ in range(2):  # a refused model leaves nothing on disk that would be accepted the second time
        with pytest.raises(ValueError, match=f"tensor '{name}': expected finite weights, found 1 NaN"):
            LLM(str(folder))


def test_the_index_counts_from_the_first_row_of_the_tensor():
    weights = np.ones((3000, 32), np.float32)
    weights[2050, 5] = np.inf
    tensor = StoredTensor("w", "f32", weights.shape, weights)
    with pytest.raises(ValueError, match=r"tensor 'w': expected finite weights.*index \[2050, 5\]"):
        pack(Q8_0, Weight("w", "q8_0", weights.shape, (tensor,)))


def test_weights_too_large_for_a_format_are_named():
    tensor = StoredTensor("w", "f32", (16, 32), np.full((16, 32), 1e9, np.float32))
    with pytest.raises(ValueError, match=r"tensor 'w': block scale .* does not fit float16"):
        pack(Q8_0, Weight("w", "q8_0", (16, 32), (tensor,)))


def test_reading_a_file_that_was_truncated_since(tmp_path):
    folder = write_folder(tmp_path / "m", {"w": WEIGHTS})
    tensor, path = open_checkpoint(folder).tensors["w"], folder / "model.safetensors"
    assert (tensor.read(slice(3, 9)) == WEIGHTS[3:9]).all() and not tensor.data.flags.owndata
    size = path.stat().st_size
    os.truncate(path, size - 40 * 256 * 4)
    assert (tensor.read(slice(0, 30)) == WEIGHTS[:30]).all()
    with pytest.raises(ValueError, match=f"model.safetensors: the file had {size} bytes when it was opened"):
        tensor.to_f32(slice(20, 40))


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        remove,
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, 200),
        lambda path: os.truncate(path, path.stat().st_size - 1),
    ],
)
def test_damaged_packed_weights_are_packed_again(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(shared_kernels(tmp_path / "cache")))
    folder, answers = tiny.write(tmp_path / "m", QWEN3, tiny.tensors(QWEN3, 3)), []
    for packed in (True, True, False):  # damaged, so packed again; then whole, so not packed
        reports = []
        llm = LLM(str(folder), weights="q8_0", progress=lambda *report, reports=reports: reports.append(report))
        answers.append(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5, ignore_eos=True))[0].logprobs)
        llm.close()
        assert ("packing" in {what for what, *_ in reports}) == packed
        if len(answers) == 1:
            damaged = list((tmp_path / "cache" / "packed").rglob("*.packed"))
            assert len(damaged) > 4
            for path in damaged:
                damage(path)
    assert answers[0] == answers[1] == answers[2]


def test_a_model_that_is_written_to_while_it_is_loaded_is_refused(tmp_path, monkeypatch):
    """Also after the content hash is known, because some weights were read before the change, others after."""
    monkeypatch.setenv("LOCKSTEP_CACHE", str(shared_kernels(tmp_path / "cache")))
    folder, make = tiny.write(tmp_path / "m", QWEN3, tiny.tensors(QWEN3, 3)), PackedStore.make

    def writing(store, weight, layout):
        store.checkpoint.content.wait()
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(bytes(4))
        return make(store, weight, layout)

    monkeypatch.setattr(PackedStore, "make", writing)
    with pytest.raises(ValueError, match=r"model\.safetensors: the file changed while the model was being loaded"):
        LLM(str(folder))


TRUNCATED_WHILE_OPEN = """
import os, sys
from pathlib import Path
from lockstep import LLM, SamplingParams
from lockstep.engine.engine import Engine
folder, when = sys.argv[1:]
truncate = lambda: os.truncate(Path(folder) / "model.safetensors", 4096)
if when == "loading":
    made = Engine.__init__
    Engine.__init__ = lambda *args: (truncate(), made(*args))[1]
try:
    llm = LLM(folder, threads=1)
    expected = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5, ignore_eos=True))
    truncate()
    again = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert again[0].logprobs == expected[0].logprobs
    print("same")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("can_keep", [True, False])
@pytest.mark.parametrize(("when", "said"), [("loading", "the file had"), ("running", "same")])
def test_a_file_that_is_truncated_does_not_end_the_process(when, said, can_keep, tmp_path):
    folder = tiny.write(tmp_path / "m", QWEN3, tiny.tensors(QWEN3, 3))
    cache = shared_kernels(tmp_path / "cache")
    if not can_keep:
        (cache / "packed").write_text("a file where the folder of packed weights would be")
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "LOCKSTEP_CACHE": str(cache), "PYTHONPATH": path}
    for _ in range(2 if when == "running" else 1):  # the second run uses what the first kept on disk, if anything
        code = [sys.executable, "-c", TRUNCATED_WHILE_OPEN, str(folder), when]
        done = subprocess.run(code, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and said in done.stdout, (done.returncode, done.stdout, done.stderr[-2000:])
        is_told = "of packed weights cannot be kept" in done.stderr and "Set LOCKSTEP_CACHE" in done.stderr
        assert is_told == (not can_keep and when == "running"), done.stderr
        folder = tiny.write(tmp_path / "m", QWEN3, tiny.tensors(QWEN3, 3))
