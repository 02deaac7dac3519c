"""Opening GGUF files (versions 2 and 3, little-endian, also split): metadata, tensor directory, aligned data.

Source: docs/gguf.md in github.com/ggml-org/ggml. Every count, length and offset is checked against the
file and against a limit before anything is read or allocated with it.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

from lockstep.formats import FORMATS, MXFP4
from lockstep.weights.gguf.metadata import Allowance, Cursor, read_metadata
from lockstep.weights.mapped import cut_off, map_file
from lockstep.weights.tensor import TensorFile, TensorInfo, merge, stored_shape

MAGIC = b"GGUF"
BYTES = "u8"  # the format of tensors that `undo.FromPairs` reads
MAX_TENSORS = 1 << 17
MAX_DIMS = 4
MAX_DIM = 1 << 48
MAX_NAME_BYTES = 1 << 10
MAX_ALIGNMENT = 1 << 20
MAX_PARTS = 1 << 12
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

# GGML's type numbers: the supported ones, then others, whose names appear in errors.
FORMAT_OF_TYPE: Mapping[int, str] = dict(
    sorted(
        {f.gguf_type: name for name, f in FORMATS.items() if f.gguf_type is not None}.items()
        | {24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64"}.items()
    )
)
PAIRS_TYPE = 4  # MXFP4 in Ollama's first files of gpt-oss, as bytes; GGUF never had the type that GGML gave this number
OTHER_TYPES: Mapping[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
}  # fmt: skip


def is_gguf(path: Path) -> bool:
    """Whether a file is meant as GGUF: by its name, or by its first bytes, as in Ollama's store."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf"
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_parts(path: Path) -> list[TensorFile]:
    """Open a .gguf file, or all parts of a split one in order, whichever part is named.

    Raises ValueError if a part is missing or does not belong, or a tensor is in two parts.
    """
    first = open_file(path)
    num_parts = _unsigned(first.metadata, "split.count", 1, MAX_PARTS, path)
    if num_parts <= 1:
        return [first]
    allowance = Allowance()
    parts = [open_file(part, allowance) for part in _part_paths(path, num_parts)]
    for number, part in enumerate(parts):
        _check_part(part, number, num_parts)
    num_tensors = len(merge(parts))
    expected = parts[0].metadata.get("split.tensors.count", num_tensors)
    if expected != num_tensors:
        raise ValueError(f"{parts[0].path}: split.tensors.count is {expected}, the parts hold {num_tensors} tensors")
    return parts


def open_file(path: Path, allowance: Allowance | None = None) -> TensorFile:
    """Map one .gguf file and check its whole header, whose metadata is charged to the allowance.

    Raises ValueError that says what is wrong with the file.
    """
    raw = map_file(path)
    cursor = Cursor(raw, str(path), allowance)
    num_tensors, num_pairs = _read_counts(cursor)
    metadata = read_metadata(cursor, num_pairs)
    alignment = _alignment(metadata, path)
    directory = [_read_tensor(cursor, index) for index in range(num_tensors)]
    header_hash = hashlib.sha256(raw[: cursor.position].data).hexdigest()
    data_start = -(-cursor.position // alignment) * alignment
    infos = _unique_infos(directory, path)
    begins = {info.name: data_start + offset for info, offset in directory}
    _check_layout(infos, begins, alignment, len(raw), path)
    return TensorFile(path, raw, header_hash, metadata, infos, begins)


def _read_counts(cursor: Cursor) -> tuple[int, int]:
    magic = bytes(cursor.take(min(4, len(cursor.buffer)), "magic"))
    if magic != MAGIC:
        raise ValueError(f"{cursor.where}: expected a GGUF file, it starts with {magic!r}")
    version = cursor.unsigned(4, "version")
    if version & 0xFFFF == 0:
        raise ValueError(f"{cursor.where}: big-endian GGUF files are not supported, only little-endian ones")
    if version not in (2, 3):
        raise ValueError(f"{cursor.where}: GGUF version {version} is not supported, only 2 and 3")
    # A directory entry takes at least 32 bytes, a metadata pair at least 13.
    num_tensors = cursor.count(8, "tensor count", MAX_TENSORS, 32)
    return num_tensors, cursor.count(8, "metadata count", 1 << 16, 13)


def _read_tensor(cursor: Cursor, index: int) -> tuple[TensorInfo, int]:
    """One directory entry as its info and its offset within the data section."""
    name = cursor.string(f"name of tensor {index}", MAX_NAME_BYTES)
    where = f"tensor {name!r}"
    num_dims = cursor.unsigned(4, f"{where} dimension count")
    if not 0 < num_dims <= MAX_DIMS:
        raise ValueError(f"{cursor.where}: {where} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
    dims = [cursor.unsigned(8, f"{where} dimension") for _ in range(num_dims)]
    if any(not 0 < dim < MAX_DIM for dim in dims):
        raise ValueError(f"{cursor.where}: {where} has dimensions {dims}, expected 1 to 2^48 each")
    ggml_type = cursor.unsigned(4, f"{where} type")
    offset = cursor.unsigned(8, f"{where} offset")
    # GGML lists the fastest-moving dimension first.
    return _info(name, ggml_type, tuple(reversed(dims)), cursor.where), offset


def _info(name: str, ggml_type: int, shape: tuple[int, ...], path: str) -> TensorInfo:
    if ggml_type == PAIRS_TYPE and shape[-1] % MXFP4.block_size == 0:
        shape = (*shape[:-1], MXFP4.row_bytes(shape[-1]))
        return TensorInfo(name, BYTES, shape, math.prod(shape))
    if ggml_type not in FORMAT_OF_TYPE:
        type_name = OTHER_TYPES.get(ggml_type, f"number {ggml_type}")
        supported = ", ".join(format.upper() for format in FORMAT_OF_TYPE.values())
        raise ValueError(f"{path}: tensor {name!r} has type {type_name}, which is not supported, only {supported}")
    format = FORMAT_OF_TYPE[ggml_type]
    try:
        stored, dtype = stored_shape(format, shape)
    except ValueError as error:
        raise ValueError(f"{path}: tensor {name!r} {list(shape)} as {format}: {error}") from None
    return TensorInfo(name, format, shape, math.prod(stored) * dtype.itemsize)


def _alignment(metadata: Mapping[str, object], path: Path) -> int:
    alignment = _unsigned(metadata, "general.alignment", 32, MAX_ALIGNMENT, path)
    if alignment == 0 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment must be a power of two, found {alignment}")
    return alignment


def _unsigned(metadata: Mapping[str, object], key: str, default: int, limit: int, path: Path) -> int:
    value = metadata.get(key, default)
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{path}: {key} must be an integer from 0 to {limit}, found {value!r}")
    return value


def _unique_infos(directory: list[tuple[TensorInfo, int]], path: Path) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for info, _ in directory:
        if info.name in infos:
            raise ValueError(f"{path}: tensor {info.name!r} is listed twice")
        infos[info.name] = info
    return infos


def _check_layout(
    infos: Mapping[str, TensorInfo], begins: Mapping[str, int], alignment: int, size: int, path: Path
) -> None:
    """Tensors must be aligned, end within the file and not overlap."""
    previous_end = 0
    for name in sorted(infos, key=begins.__getitem__):
        begin, end = begins[name], begins[name] + infos[name].num_bytes
        if begin % alignment:
            raise ValueError(f"{path}: tensor {name!r} begins at byte {begin}, not a multiple of {alignment}")
        if end > size:
            raise cut_off(str(path), f"tensor {name!r} ends at byte {end} of {size} bytes of the file")
        if begin < previous_end:
            raise ValueError(f"{path}: tensor {name!r} begins at byte {begin}, inside the tensor before it")
        previous_end = end


def _part_paths(path: Path, num_parts: int) -> list[Path]:
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != num_parts:
        raise ValueError(f"{path}: one of {num_parts} parts, its name should end in -00001-of-{num_parts:05d}.gguf")
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, num_parts + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {num_parts} parts are missing, the first is {missing[0]}")
    return parts


def _check_part(part: TensorFile, number: int, num_parts: int) -> None:
    found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
    if found != (number, num_parts):
        raise ValueError(f"{part.path}: expected split.no, split.count = {(number, num_parts)}, found {found}")
