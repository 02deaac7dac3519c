"""Safetensors: an 8-byte header length, a JSON header, then the tensors' bytes without gaps.

Source: the format description in the README of github.com/huggingface/safetensors. Every length and
offset is checked against the file before anything is read or allocated with it.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lockstep.weights.mapped import cut_off, map_file, parse_json_object, read_json_object
from lockstep.weights.sources.quants import gguf_models
from lockstep.weights.tensor import PLAIN_FORMATS, TensorFile, TensorInfo

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 17
MAX_DIMS = 16
MAX_DIM = 1 << 48
STEM = "model"
SUFFIX = ".safetensors"
INDEX = f"{SUFFIX}.index.json"
INDEX_NAME = STEM + INDEX
CONVERT = "such files may run code when they are read; have them converted to safetensors"
PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt")

FORMAT_OF_DTYPE: Mapping[str, str] = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16",
    "F8_E4M3": "f8_e4m3", "F8_E5M2": "f8_e5m2", "F8_E8M0": "f8_e8m0",
    "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8",
    "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8", "BOOL": "bool",
}  # fmt: skip


def open_file(path: Path) -> TensorFile:
    """Map one .safetensors file and check its whole header. Raises ValueError saying what is wrong with it."""
    raw = map_file(path)
    header_bytes = _header_length(raw, path)
    data_start = 8 + header_bytes
    header = raw[8:data_start].tobytes()
    entries = parse_json_object(header, f"{path}: header")
    _check_metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{path}: header of {len(entries)} tensors, at most {MAX_TENSORS} are allowed")
    spans = {name: _parse_entry(name, entry, path) for name, entry in entries.items()}
    _check_layout(spans, len(raw) - data_start, path)
    infos = {name: info for name, (info, _) in spans.items()}
    begins = {name: data_start + begin for name, (_, begin) in spans.items()}
    return TensorFile(path, raw, hashlib.sha256(header).hexdigest(), {}, infos, begins)


def open_folder(folder: Path, stem: str = STEM) -> list[TensorFile]:
    """Open a folder's checkpoint: the shards that its index names, or else its only .safetensors file. stem: the
    beginning of the files' names.

    A tensor counts only in the shard in which the index lists it.
    Raises ValueError if a shard or a tensor that the index names is missing, or a file is broken.
    """
    index_path = folder / (stem + INDEX)
    if index_path.is_file():
        return _open_shards(folder, index_path)
    return [open_file(path) for path in _without_index(folder, stem)]


def _header_length(raw: np.ndarray, path: Path) -> int:
    if len(raw) < 8:
        raise ValueError(f"{path}: expected an 8-byte header length, the file has {len(raw)} bytes")
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES or length > len(raw) - 8:
        allowed = min(MAX_HEADER_BYTES, len(raw) - 8)
        raise ValueError(f"{path}: header of {length} bytes, at most {allowed} are possible in this file")
    return length


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must be an object of strings")


def _parse_entry(name: str, entry: object, path: Path) -> tuple[TensorInfo, int]:
    """One header entry as its info and its begin within the data section."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected an object with dtype, shape and data_offsets")
    format = _format(entry["dtype"], where)
    shape = tuple(_integers(entry["shape"], MAX_DIMS, f"{where}: shape"))
    offsets = _integers(entry["data_offsets"], 2, f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets must be [begin, end] with begin <= end, found {offsets}")
    num_bytes = offsets[1] - offsets[0]
    expected = math.prod(shape) * PLAIN_FORMATS[format].itemsize
    if expected != num_bytes:
        raise ValueError(f"{where}: {format} {list(shape)} takes {expected} bytes, data_offsets give {num_bytes}")
    return TensorInfo(name, format, shape, num_bytes), offsets[0]


def _format(dtype: object, where: str) -> str:
    if not isinstance(dtype, str) or dtype not in FORMAT_OF_DTYPE:
        raise ValueError(f"{where}: dtype {dtype!r} is not supported, only {', '.join(FORMAT_OF_DTYPE)}")
    return FORMAT_OF_DTYPE[dtype]


def _integers(value: object, max_length: int, where: str) -> list[int]:
    if not isinstance(value, list) or len(value) > max_length:
        raise ValueError(f"{where}: expected a list of at most {max_length} integers")
    for item in value:
        # isinstance would also accept bools.
        if type(item) is not int or not 0 <= item < MAX_DIM:
            raise ValueError(f"{where}: expected integers from 0 to 2^48, found {item!r}")
    return value


def _check_layout(spans: dict[str, tuple[TensorInfo, int]], data_bytes: int, path: Path) -> None:
    """Tensors must fill the data section exactly: no overlap, no gap, no end past the file."""
    position = 0
    for info, begin in sorted(spans.values(), key=lambda span: (span[1], span[0].num_bytes)):
        end = begin + info.num_bytes
        if end > data_bytes:
            raise cut_off(str(path), f"tensor {info.name!r} ends at byte {end} of {data_bytes} bytes of data")
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise ValueError(f"{path}: tensor {info.name!r} {problem}: begins at {begin}, expected {position}")
        position = end
    if position != data_bytes:
        raise ValueError(f"{path}: tensors end at byte {position}, the file has {data_bytes} bytes of data")


def _open_shards(folder: Path, index_path: Path) -> list[TensorFile]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_path}: expected a weight_map from tensor names to shard files")
    names_of_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        names_of_shard.setdefault(_shard_name(shard, index_path), []).append(name)
    whole = index_path.with_name(index_path.name.removesuffix(INDEX) + SUFFIX)
    if whole.is_file() and whole.name not in names_of_shard:
        raise ValueError(
            f"{folder}: expected one checkpoint, found two: {whole.name}, and the {len(names_of_shard)} files that "
            f"{index_path.name} names; remove the one that is not meant"
        )
    return [_open_shard(folder / shard, names, index_path) for shard, names in sorted(names_of_shard.items())]


def _shard_name(shard: object, index_path: Path) -> str:
    if not (isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")):
        raise ValueError(f"{index_path}: expected a .safetensors file name in this folder, found {shard!r}")
    return shard


def _open_shard(path: Path, names: list[str], index_path: Path) -> TensorFile:
    if not path.is_file():
        raise ValueError(f"{index_path}: shard {path.name} is missing (tensor {names[0]!r} and {len(names) - 1} more)")
    file = open_file(path)
    absent = [name for name in names if name not in file.infos]
    if absent:
        raise ValueError(f"{path}: tensor {absent[0]!r} is missing, {index_path.name} says it is in this shard")
    listed = set(names)
    return replace(file, infos={name: info for name, info in file.infos.items() if name in listed})


def _without_index(folder: Path, stem: str) -> list[Path]:
    default, found = folder / f"{stem}.safetensors", sorted(folder.glob("*.safetensors"))
    if default.is_file():
        return [default]
    if len(found) != 1 and not _are_parts([path.name for path in found], stem):
        names = ", ".join(path.name for path in found[:4]) or "none"
        raise ValueError(
            f"{folder}: expected {stem}.safetensors, {stem}{INDEX} or one .safetensors file, found {names}"
            + ("" if found else _said_of_others(folder))
        )
    return found


def has_weights(folder: Path) -> bool:
    """Whether there are weights in a folder, in safetensors or in another form."""
    return any(folder.glob("*.safetensors*")) or bool(others(folder))


def others(folder: Path) -> list[tuple[str, str]]:
    """(name, what is to be done) of the files in a folder that hold weights in other forms."""
    models = gguf_models(path.name for path in folder.glob("*.gguf"))
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    return [(name, "name that file in place of its folder") for name in models] + [(name, CONVERT) for name in pickles]


def _said_of_others(folder: Path) -> str:
    return "".join(f", but {name}: {advice}" for name, advice in others(folder)[:1])


def _are_parts(names: list[str], stem: str) -> bool:
    """Whether files are all the parts of one, each once: STEM-00001-of-00002 and so on."""
    count = len(names)
    return bool(names) and names == [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
