"""Headers that would fill the memory are refused; headers of the largest models are read."""

import json
import os
import struct
import tracemalloc

import pytest

from lockstep.weights import safetensors
from lockstep.weights.gguf import file as gguf
from lockstep.weights.gguf.metadata import MAX_ARRAY_ITEMS, MAX_NESTED_ARRAYS, Allowance
from tests.weights.files import ARRAY, FLOAT32, INT32, STRING, UINT8, gguf_bytes, gguf_string, with_header, write


def head(num_pairs, num_tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs)


def array(key, kind, length):
    return gguf_string(key) + struct.pack("<IIQ", ARRAY, kind, length)


def sparse(path, content, size):
    """A file of `size` bytes that takes almost no room on disk."""
    write(path, content)
    os.truncate(path, size)
    return path


def test_items_of_all_arrays_count_together(tmp_path):
    items = array("numbers", UINT8, MAX_ARRAY_ITEMS - 1) + bytes(MAX_ARRAY_ITEMS - 1)
    path = sparse(tmp_path / "m.gguf", head(2) + items + array("words", STRING, 2), MAX_ARRAY_ITEMS + (1 << 20))
    with pytest.raises(
        ValueError,
        match=r"m\.gguf: metadata 'words' has 2 items: 16777216 are allowed in all metadata, "
        "1 are left",
    ):
        gguf.open_file(path)


def test_arrays_inside_of_arrays_count_together(tmp_path):
    inner = array("k", ARRAY, MAX_NESTED_ARRAYS) + struct.pack("<IQ", UINT8, 0) * MAX_NESTED_ARRAYS
    path = sparse(tmp_path / "m.gguf", head(2) + inner + array("l", ARRAY, 1), 1 << 21)
    with pytest.raises(ValueError, match="metadata 'l' has 1 arrays: 65536 are allowed in all metadata, 0 are left"):
        gguf.open_file(path)


def test_texts_count_together_over_all_files_of_a_split_model(tmp_path):
    allowance = Allowance(text_bytes=1000)
    path = write(tmp_path / "m.gguf", gguf_bytes({"general.name": (STRING, "a" * 400)}, {}))
    for _ in range(2):
        gguf.open_file(path, allowance)
    with pytest.raises(ValueError, match=r"metadata 'general\.name' has 400 text bytes: .* 164 are left"):
        gguf.open_file(path, allowance)


def test_a_file_without_room_for_its_items_takes_no_memory(tmp_path):
    words = array("words", STRING, MAX_ARRAY_ITEMS)
    path = sparse(tmp_path / "m.gguf", head(2) + array("first", UINT8, 1) + b"a" + words, 1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="has 16777216 items"):
            gguf.open_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_vocabularies_are_read(tmp_path):
    def words(count):
        return b"".join(gguf_string(f"word {i}") for i in range(count))

    content = head(4) + array("tokenizer.ggml.tokens", STRING, 300_000) + words(300_000)
    content += array("tokenizer.ggml.merges", STRING, 600_000) + words(600_000)
    content += array("tokenizer.ggml.scores", FLOAT32, 300_000) + bytes(1_200_000)
    content += array("tokenizer.ggml.token_type", INT32, 300_000) + bytes(1_200_000)
    metadata = gguf.open_file(write(tmp_path / "m.gguf", content)).metadata
    assert [len(value) for value in metadata.values()] == [300_000, 600_000, 300_000, 300_000]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert list(tokens) == [f"word {i}" for i in range(300_000)]
    assert [tokens[i] for i in (0, 1, 299_999, -1)] == ["word 0", "word 1", "word 299999", "word 299999"]


def test_files_of_many_tensors_are_read(tmp_path):
    name = "model.layers.61.mlp.experts.{}.down_proj.weight"
    entries = {name.format(i): dict(dtype="U8", shape=[1], data_offsets=[i, i + 1]) for i in range(100_000)}
    header = json.dumps(entries, separators=(",", ":"))
    file = safetensors.open_file(write(tmp_path / "m.safetensors", with_header(header, bytes(100_000))))
    assert len(file.infos) == 100_000
    directory = b"".join(
        gguf_string(f"blk.61.ffn_down.{i}.weight") + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(20_000)
    )
    content = head(0, 20_000) + directory
    content += bytes(-len(content) % 32)
    assert len(gguf.open_file(sparse(tmp_path / "m.gguf", content, len(content) + 32 * 20_000)).infos) == 20_000
    assert gguf.MAX_TENSORS > 100_000


@pytest.mark.parametrize(
    "header, says",
    [
        (lambda: json.dumps(dict.fromkeys(range(140_000), 0)), "header of 140000 tensors, at most 131072"),
        (lambda: '{"a":{' + '"":"",' * 700_000 + '"":""}}', "700002 times ':' in"),
        (lambda: '{"a":[' + "1," * 1_600_000 + "1]}", "1600000 times ',' in"),
        (lambda: " " * (33 << 20), "header of 34603008 bytes, at most 33554432"),
    ],
    ids=["tensors", "fields", "values", "size"],
)
def test_headers_that_would_take_too_much_memory_are_refused(tmp_path, header, says):
    with pytest.raises(ValueError, match=says):
        safetensors.open_file(write(tmp_path / "m.safetensors", with_header(header(), b"")))
