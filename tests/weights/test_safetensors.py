"""The safetensors reader: valid files, every kind of wrong header, and random damage."""

import json

import ml_dtypes
import numpy as np
import pytest

from lockstep.weights import safetensors
from lockstep.weights.tensor import check_finite, merge
from tests.weights.files import one_tensor, safetensors_bytes, with_header, write
from tests.weights.fuzz import mutations, truncations


def small_tensors():
    rng = np.random.default_rng(1)
    return {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((2, 4)).astype(ml_dtypes.bfloat16),
        "half": rng.standard_normal(6).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
        "ids": np.arange(4, dtype=np.int32),
    }


def read(path):
    """Opens a file and reads every tensor."""
    tensors = merge([safetensors.open_file(path)])
    return {name: tensor.to_f32() for name, tensor in tensors.items()}


def test_reads_what_was_written(tmp_path):
    expected = small_tensors()
    tensors = merge([safetensors.open_file(write(tmp_path / "m.safetensors", safetensors_bytes(expected)))])
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        tensor = tensors[name]
        assert tensor.shape == array.shape == tensors.info[name].shape
        assert tensor.data.dtype == array.dtype and tensor.data.tobytes() == array.tobytes()
        assert not tensor.data.flags.writeable
    assert tensors["b.weight"].format == "bf16" and tensors["half"].format == "f16"


def test_against_the_safetensors_package(tmp_path):
    oracle = pytest.importorskip("safetensors.numpy")
    expected = {name: array for name, array in small_tensors().items() if array.dtype.name != "bfloat16"}
    oracle.save_file(expected, tmp_path / "m.safetensors")
    for name, array in read(tmp_path / "m.safetensors").items():
        assert (array == expected[name]).all()


def test_rows_of_a_tensor(tmp_path):
    expected = small_tensors()
    file = safetensors.open_file(write(tmp_path / "m.safetensors", safetensors_bytes(expected)))
    rows = file.load("b.weight").to_f32(slice(1, 2))
    assert (rows == expected["b.weight"][1:2].astype(np.float32)).all()


def test_unaligned_data_is_copied_not_misread(tmp_path):
    content = with_header(json.dumps({"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}), bytes(range(24)))
    length = int.from_bytes(content[:8], "little") + 1
    shifted = length.to_bytes(8, "little") + content[8 : 8 + length - 1] + b" " + content[-24:]
    data = safetensors.open_file(write(tmp_path / "m.safetensors", shifted)).load("w").data
    assert data.flags.aligned and data.tobytes() == bytes(range(24))


HUGE = 1 << 47
ENTRY = '{"dtype":"F32","shape":[6],"data_offsets":[0,24]}'
BROKEN = {
    "header longer than the file": (b"\xff" * 7 + b"\x00" + b"{}", "header of"),
    "header of 200 MB": ((200_000_000).to_bytes(8, "little") + bytes(64), "header of"),
    "not JSON": (with_header("{nonsense", b""), "not valid JSON"),
    "not an object": (with_header("[1]", b""), "expected a JSON object"),
    "not UTF-8": ((7).to_bytes(8, "little") + b'{"\xff":1}', "not valid JSON"),
    "deep JSON": (with_header("[" * 5000 + "]" * 5000, b""), "nested too deeply"),
    "a million lists": (with_header('{"a":[' + "[]," * 1_000_000 + "[]]}", b""), "lists and objects"),
    "duplicate name": (with_header(f'{{"w":{ENTRY},"w":{ENTRY}}}', bytes(24)), "duplicate name 'w'"),
    "duplicate field": (with_header(f'{{"w":{{"dtype":"F16",{ENTRY[1:]}}}', bytes(24)), "duplicate name 'dtype'"),
    "metadata of numbers": (with_header('{"__metadata__":{"a":1}}', b""), "__metadata__"),
    "entry not an object": (with_header('{"w":3}', b""), "tensor 'w'"),
    "missing field": (with_header('{"w":{"dtype":"F32","shape":[6]}}', bytes(24)), "tensor 'w'"),
    "unknown dtype": (one_tensor(dtype="F4"), "tensor 'w': dtype 'F4'"),
    "dtype not a string": (one_tensor(dtype=["F32"]), "tensor 'w': dtype"),
    "shape too big": (one_tensor(shape=[2, 4]), r"tensor 'w': f32 \[2, 4\] takes 32 bytes, data_offsets give 24"),
    "overflowing shape": (one_tensor(shape=[HUGE, HUGE, HUGE]), "tensor 'w'"),
    "zero times huge": (one_tensor(data=b"", shape=[0, 1 << 60], data_offsets=[0, 0]), "tensor 'w': shape"),
    "negative dimension": (one_tensor(shape=[-2, -3]), "tensor 'w': shape"),
    "boolean dimension": (one_tensor(shape=[True, 6]), "tensor 'w': shape"),
    "fractional dimension": (one_tensor(shape=[2.0, 3]), "tensor 'w': shape"),
    "digits without end": (with_header('{"w":{"shape":[' + "9" * 5000 + "]}}", b""), "not valid JSON"),
    "too many dimensions": (one_tensor(shape=[1] * 40 + [6]), "tensor 'w': shape"),
    "offsets backwards": (one_tensor(data_offsets=[24, 0]), "tensor 'w': data_offsets"),
    "offsets of three": (one_tensor(data_offsets=[0, 24, 24]), "tensor 'w': data_offsets"),
    "past the end": (one_tensor(data=bytes(20)), "tensor 'w' ends at byte 24 of 20"),
    "far past the end": (one_tensor(shape=[HUGE], data_offsets=[0, 4 * HUGE]), "tensor 'w'"),
    "gap at the start": (one_tensor(data=bytes(28), data_offsets=[4, 28]), "tensor 'w' leaves a gap"),
    "bytes left over": (one_tensor(data=bytes(25)), "24, the file has 25"),
    "overlap": (
        with_header(f'{{"w":{ENTRY},"v":{{"dtype":"F32","shape":[6],"data_offsets":[20,44]}}}}', bytes(44)),
        "tensor 'v' overlaps",
    ),
    "NaN in JSON": (with_header('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}', bytes(24)), "'w'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_name_what_is_wrong(name, tmp_path):
    content, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "m.safetensors", content))


def test_empty_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        safetensors.open_file(write(tmp_path / "m.safetensors", b""))
    with pytest.raises(ValueError, match="no such file"):
        safetensors.open_file(tmp_path / "absent.safetensors")


def test_every_truncation_is_refused(tmp_path):
    content = safetensors_bytes(small_tensors())
    truncations(content, tmp_path / "m.safetensors", read, len(content))


def test_damaged_files_only_raise_value_errors(tmp_path):
    accepted = mutations(safetensors_bytes(small_tensors()), tmp_path / "m.safetensors", read, rounds=600, seed=3)
    assert 0 < accepted < 600


def write_shards(folder, **changes):
    tensors = small_tensors()
    first = {name: tensors[name] for name in ("a.weight", "half")}
    second = {name: array for name, array in tensors.items() if name not in first}
    write(folder / "one.safetensors", safetensors_bytes(first))
    write(folder / "two.safetensors", safetensors_bytes(second))
    shard_of = {**dict.fromkeys(first, "one.safetensors"), **dict.fromkeys(second, "two.safetensors"), **changes}
    write(folder / safetensors.INDEX_NAME, json.dumps({"weight_map": shard_of}))
    return tensors


def test_shards(tmp_path):
    expected = write_shards(tmp_path)
    tensors = merge(safetensors.open_folder(tmp_path))
    assert set(tensors) == set(expected)
    assert all(tensors[name].data.tobytes() == array.tobytes() for name, array in expected.items())


@pytest.mark.parametrize("shard", ["../one.safetensors", "/etc/one.safetensors", "a\\b.safetensors", "c:x.safetensors",
                                   "config.json", 3, None])  # fmt: skip
def test_shard_names_stay_in_the_folder(shard, tmp_path):
    write_shards(tmp_path, extra=shard)
    with pytest.raises(ValueError, match=r"expected a \.safetensors file name in this folder"):
        safetensors.open_folder(tmp_path)


def test_index_naming_what_is_not_there(tmp_path):
    write_shards(tmp_path, extra="one.safetensors")
    with pytest.raises(ValueError, match="tensor 'extra' is missing"):
        safetensors.open_folder(tmp_path)
    write_shards(tmp_path, extra="three.safetensors")
    with pytest.raises(ValueError, match=r"shard three\.safetensors is missing"):
        safetensors.open_folder(tmp_path)


def test_a_tensor_is_where_the_index_says(tmp_path):
    expected = write_shards(tmp_path)
    strange = {"a.weight": np.zeros((3, 5), np.float32), "left.over": np.ones(3, np.float32)}
    write(tmp_path / "two.safetensors", safetensors_bytes({**expected, **strange}))
    tensors = merge(safetensors.open_folder(tmp_path))
    assert set(tensors) == set(expected) == set(tensors.info)
    assert all(tensors[name].data.tobytes() == array.tobytes() for name, array in expected.items())


def test_a_tensor_in_two_files(tmp_path):
    files = [safetensors.open_file(write(tmp_path / f"{name}.safetensors", one_tensor())) for name in "ab"]
    with pytest.raises(ValueError, match=r"tensor 'w' is in both .*a\.safetensors and .*b\.safetensors"):
        merge(files)


def test_a_whole_file_beside_the_shards_of_an_index(tmp_path):
    """One of the two is old, and only the user knows which."""
    expected = write_shards(tmp_path)
    write(tmp_path / "model.safetensors", safetensors_bytes(expected))
    with pytest.raises(
        ValueError, match=r"found two: model\.safetensors, and the 2 files that model\.safetensors\.index"
    ):
        safetensors.open_folder(tmp_path)
    index = {"weight_map": dict.fromkeys(expected, "model.safetensors")}
    write(tmp_path / safetensors.INDEX_NAME, json.dumps(index))
    assert [file.path.name for file in safetensors.open_folder(tmp_path)] == ["model.safetensors"]


def test_index_without_a_map(tmp_path):
    write(tmp_path / safetensors.INDEX_NAME, "{}")
    with pytest.raises(ValueError, match="weight_map"):
        safetensors.open_folder(tmp_path)


def test_which_file_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        safetensors.open_folder(tmp_path)
    write(tmp_path / "other.safetensors", safetensors_bytes(small_tensors()))
    assert safetensors.open_folder(tmp_path)[0].path.name == "other.safetensors"
    write(tmp_path / "another.safetensors", safetensors_bytes({}))
    with pytest.raises(ValueError, match=r"found another\.safetensors, other\.safetensors"):
        safetensors.open_folder(tmp_path)
    write(tmp_path / "model.safetensors", safetensors_bytes({}))
    assert safetensors.open_folder(tmp_path)[0].path.name == "model.safetensors"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_names_count_and_first(dtype, bad, tmp_path):
    weights = np.ones((4, 6), dtype)
    file = safetensors.open_file(write(tmp_path / "good.safetensors", safetensors_bytes({"w": weights})))
    check_finite(file.load("w"), file.load("w").data)
    weights[2, 5] = weights[3, 0] = bad
    tensor = safetensors.open_file(write(tmp_path / "bad.safetensors", safetensors_bytes({"w": weights}))).load("w")
    with pytest.raises(ValueError, match=r"tensor 'w': .* found 2 NaN or infinite, .* at index \[2, 5\]"):
        check_finite(tensor, tensor.data)
