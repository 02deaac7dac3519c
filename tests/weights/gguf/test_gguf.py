"""The GGUF reader: valid files of both versions, every kind of wrong header, split files, and random damage."""

import struct

import ml_dtypes
import numpy as np
import pytest

from lockstep.formats import Q8_0
from lockstep.weights.gguf import file as gguf
from lockstep.weights.gguf.metadata import MAX_ARRAY_DEPTH
from tests.weights.files import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    gguf_bytes,
    gguf_string,
    plain_tensors,
    write,
)
from tests.weights.fuzz import mutations, truncations

METADATA = {
    "general.architecture": (STRING, "llama"),
    "u8": (UINT8, 200),
    "i8": (INT8, -100),
    "u16": (UINT16, 60000),
    "i16": (INT16, -30000),
    "u32": (UINT32, 4_000_000_000),
    "i32": (INT32, -2_000_000_000),
    "u64": (UINT64, (1 << 64) - 1),
    "i64": (INT64, -(1 << 63)),
    "f32": (FLOAT32, 0.5),
    "f64": (FLOAT64, 0.1),
    "yes": (BOOL, True),
    "text": (STRING, "naïve 🙂"),
    "numbers": (ARRAY, (INT32, [1, -2, 3])),
    "flags": (ARRAY, (BOOL, [True, False])),
    "words": (ARRAY, (STRING, ["a", "", "Ġé"])),
    "nothing": (ARRAY, (STRING, [])),
    "nested": (ARRAY, (ARRAY, [(UINT8, [1, 2]), (STRING, ["x"]), (ARRAY, [(FLOAT32, [1.5])])])),
}


def small_tensors():
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((3, 64)).astype(np.float32)
    return {
        **plain_tensors(
            {"f32": weights, "bf16": weights.astype(ml_dtypes.bfloat16), "f16": weights.astype(np.float16)}
        ),
        "blocks": ("q8_0", (3, 64), Q8_0.quantize(weights).tobytes()),
        "vector": ("f32", (5,), np.arange(5, dtype=np.float32).tobytes()),
        "stack": ("f32", (2, 3, 4), np.arange(24, dtype=np.float32).tobytes()),
    }


def read(path):
    """Opens a file and reads every tensor."""
    for part in gguf.open_parts(path):
        for value in part.metadata.values():
            list(value) if hasattr(value, "__len__") else value
        for name in part.infos:
            part.load(name).to_f32()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_reads_what_was_written(version, alignment, tmp_path):
    metadata = {**METADATA, "general.alignment": (UINT32, alignment)}
    content = gguf_bytes(metadata, small_tensors(), version, alignment)
    file = gguf.open_file(write(tmp_path / "m.gguf", content))
    assert list(file.infos) == list(small_tensors())
    for name, (format, shape, raw) in small_tensors().items():
        tensor = file.load(name)
        assert (tensor.format, tensor.shape, tensor.data.tobytes()) == (format, shape, raw)
        assert not tensor.data.flags.writeable and tensor.data.flags.aligned
    assert file.load("blocks").data.shape == (3, 68)


def test_all_kinds_of_metadata(tmp_path):
    found = gguf.open_file(write(tmp_path / "m.gguf", gguf_bytes(METADATA, {}))).metadata
    for key, (kind, value) in METADATA.items():
        if kind != ARRAY:
            assert found[key] == value and type(found[key]) is type(value)
    assert found["numbers"].tolist() == [1, -2, 3] and found["flags"].tolist() == [True, False]
    words = found["words"]
    assert list(words) == ["a", "", "Ġé"] and words[2] == "Ġé" and words[-1] == "Ġé" and len(words) == 3
    assert list(found["nothing"]) == []
    first, second, third = found["nested"]
    assert first.tolist() == [1, 2] and list(second) == ["x"] and third[0].tolist() == [1.5]


def test_against_the_gguf_package(tmp_path):
    oracle = pytest.importorskip("gguf")
    writer = oracle.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    weights = np.random.default_rng().standard_normal((4, 256)).astype(np.float32)
    writer.add_tensor("plain", weights)
    packed = oracle.quants.quantize(weights, oracle.GGMLQuantizationType.Q4_0)
    writer.add_tensor("packed", packed, raw_dtype=oracle.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf.open_file(tmp_path / "m.gguf")
    assert file.metadata["llama.block_count"] == 3 and list(file.metadata["tokenizer.ggml.tokens"]) == ["a", "b"]
    assert (file.load("plain").data == weights).all()
    assert file.load("packed").shape == (4, 256) and (file.load("packed").data == packed).all()


def header(num_tensors=0, num_pairs=0, rest=b"", version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, num_tensors, num_pairs) + rest


def pair(key, kind, raw):
    return header(0, 1, gguf_string(key) + struct.pack("<I", kind) + raw)


def entry(name="w", dims=(32, 2), ggml_type=0, offset=0, data=bytes(256)):
    rest = gguf_string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    head = header(1, 0, rest + struct.pack("<IQ", ggml_type, offset))
    return head + bytes(-len(head) % 32) + data


def two_entries(first, second):
    rest = b""
    for name, offset in (first, second):
        rest += gguf_string(name) + struct.pack("<IQIQ", 1, 8, 0, offset)
    head = header(2, 0, rest)
    return head + bytes(-len(head) % 32) + bytes(64)


def nested(depth):
    return struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", UINT8, 0)


HUGE = (1 << 64) - 1
BROKEN = {
    "another magic": (header(magic=b"GGML"), "starts with b'GGML'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (header(version=1), "version 1 is not supported"),
    "version 4": (header(version=4), "version 4 is not supported"),
    "tensors without end": (header(HUGE), "tensor count"),
    "tensors beyond the file": (header(3, 0, bytes(64)), "tensor count is 3, at most 2"),
    "pairs without end": (header(0, HUGE, bytes(4096)), "metadata count"),
    "key without end": (header(0, 1, struct.pack("<Q", HUGE) + bytes(64)), "length of metadata key 0"),
    "key not UTF-8": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xff" + bytes(16)), "not UTF-8"),
    "unknown type": (pair("k", 13, bytes(64)), "'k' has unknown type 13"),
    "string without end": (pair("k", STRING, struct.pack("<Q", HUGE)), "metadata 'k'"),
    "value cut": (pair("key", UINT64, bytes(3)), "metadata 'key' takes 8 bytes"),
    "array without end": (pair("k", ARRAY, struct.pack("<IQ", FLOAT64, HUGE) + bytes(64)), "length of metadata 'k'"),
    "array of unknown": (pair("k", ARRAY, struct.pack("<IQ", 99, 1) + bytes(64)), "unknown type 99"),
    "string in array without end": (
        pair("k", ARRAY, struct.pack("<IQ", STRING, 2) + gguf_string("a") + struct.pack("<Q", HUGE)),
        "string 1 of 2 in metadata 'k'",
    ),
    "strings beyond the file": (pair("k", ARRAY, struct.pack("<IQ", STRING, 1 << 40)), "length of metadata 'k'"),
    "arrays too deep": (pair("k", ARRAY, nested(MAX_ARRAY_DEPTH + 1)), "nests arrays deeper"),
    "duplicate key": (
        header(0, 2, (gguf_string("k") + struct.pack("<IB", UINT8, 1)) * 2 + bytes(8)),
        "'k' appears twice",
    ),
    "alignment 3": (gguf_bytes({"general.alignment": (UINT32, 3)}, {}), "power of two, found 3"),
    "alignment 0": (gguf_bytes({"general.alignment": (UINT32, 0)}, {}), "power of two, found 0"),
    "alignment 2^31": (gguf_bytes({"general.alignment": (UINT32, 1 << 31)}, {}), "general.alignment"),
    "alignment text": (gguf_bytes({"general.alignment": (STRING, "32")}, {}), "general.alignment"),
    "five dimensions": (entry(dims=(1, 1, 1, 1, 1)), "tensor 'w' has 5 dimensions"),
    "a billion dimensions": (
        header(1, 0, gguf_string("w") + struct.pack("<I", 1 << 30) + bytes(64)),
        "tensor 'w' has 1073741824",
    ),
    "dimension 0": (entry(dims=(32, 0)), r"tensor 'w' has dimensions \[32, 0\]"),
    "huge dimensions": (entry(dims=(1 << 47, 1 << 47, 1 << 47)), "tensor 'w' ends at byte"),
    "dimension 2^64 - 1": (entry(dims=(HUGE,)), "tensor 'w' has dimensions"),
    "known type not supported": (entry(ggml_type=21), "tensor 'w' has type IQ3_S, which is not supported"),
    "unknown tensor type": (entry(ggml_type=1000), "tensor 'w' has type number 1000"),
    "rows not of whole blocks": (entry(dims=(33, 2), ggml_type=8), "tensor 'w' .* not a whole number of blocks of 32"),
    "offset not aligned": (entry(offset=8), "tensor 'w' begins at byte .* not a multiple of 32"),
    "offset past the end": (entry(offset=1 << 40), "tensor 'w' ends at byte"),
    "offset near 2^64": (entry(offset=HUGE - 31), "tensor 'w' ends at byte"),
    "data cut": (entry(data=bytes(255)), "tensor 'w' ends at byte"),
    "overlap": (two_entries(("v", 0), ("w", 0)), "inside the tensor before it"),
    "two of one name": (two_entries(("w", 0), ("w", 32)), "tensor 'w' is listed twice"),
    "name without end": (header(1, 0, struct.pack("<Q", 1 << 20) + bytes(1 << 10)), "length of name of tensor 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_name_what_is_wrong(name, tmp_path):
    content, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "m.gguf", content))


def test_text_that_is_not_utf8_in_a_token_list(tmp_path):
    content = pair("k", ARRAY, struct.pack("<IQ", STRING, 1) + struct.pack("<Q", 2) + b"a\xff")
    assert list(gguf.open_file(write(tmp_path / "m.gguf", content)).metadata["k"]) == ["a\ufffd"]


def test_every_truncation_is_refused(tmp_path):
    content = gguf_bytes(METADATA, {"w": small_tensors()["vector"]})
    truncations(content, tmp_path / "m.gguf", read, len(content) - 12)


def test_damaged_files_only_raise_value_errors(tmp_path):
    accepted = mutations(gguf_bytes(METADATA, small_tensors()), tmp_path / "m.gguf", read, rounds=600, seed=4)
    assert 0 < accepted < 600


def write_split(folder, count=3, **changes):
    """Three parts with two tensors each; returns their paths."""
    tensors, paths = list(small_tensors().items()), []
    for number in range(count):
        metadata = {"split.no": (UINT16, number), "split.count": (UINT16, count), "split.tensors.count": (INT32, 6)}
        content = gguf_bytes({**metadata, **changes}, dict(tensors[2 * number : 2 * number + 2]))
        paths.append(write(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf", content))
    return paths


@pytest.mark.parametrize("named", [0, 1, 2])
def test_split_files_open_from_any_part(named, tmp_path):
    parts = gguf.open_parts(write_split(tmp_path)[named])
    assert [name for part in parts for name in part.infos] == list(small_tensors())
    assert parts[0].metadata["split.no"] == 0


def test_broken_splits(tmp_path):
    paths = write_split(tmp_path)
    paths[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(ValueError, match=r"1 of 3 parts are missing, the first is m-00003-of-00003\.gguf"):
        gguf.open_parts(paths[0])
    with pytest.raises(ValueError, match=r"its name should end in -00001-of-00003\.gguf"):
        gguf.open_parts(tmp_path / "elsewhere.gguf")
    write(paths[2], paths[1].read_bytes())
    with pytest.raises(ValueError, match=r"expected split\.no, split\.count = \(2, 3\), found \(1, 3\)"):
        gguf.open_parts(paths[0])
    with pytest.raises(ValueError, match=r"split\.count must be"):
        gguf.open_parts(write_split(tmp_path, **{"split.count": (UINT32, 1 << 30)})[0])


def test_split_that_repeats_or_lacks_tensors(tmp_path):
    with pytest.raises(ValueError, match=r"split\.tensors\.count is 7, the parts hold 6"):
        gguf.open_parts(write_split(tmp_path, **{"split.tensors.count": (INT32, 7)})[0])
    paths = write_split(tmp_path)
    metadata = {"split.no": (UINT16, 2), "split.count": (UINT16, 3)}
    write(paths[2], gguf_bytes(metadata, small_tensors()))
    with pytest.raises(ValueError, match="tensor 'f32' is in both"):
        gguf.open_parts(paths[0])
