"""Writers of small checkpoint files, valid and damaged."""

import json
import struct
from pathlib import Path

import numpy as np

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
PACKING = {
    UINT8: "<B", INT8: "<b", UINT16: "<H", INT16: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?",
    UINT64: "<Q", INT64: "<q", FLOAT64: "<d",
}  # fmt: skip
GGML_TYPE = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11,
    "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq4_nl": 20, "iq4_xs": 23, "bf16": 30, "mxfp4": 39,
    "nvfp4": 40,
    "pairs": 4,  # Ollama's MXFP4
}  # fmt: skip
SAFETENSORS_DTYPE = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int64": "I64", "int32": "I32",
    "int8": "I8", "uint32": "U32", "uint8": "U8",
}  # fmt: skip


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """A valid safetensors file."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": SAFETENSORS_DTYPE[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets
        }  # fmt: skip
        data += raw
    return with_header(json.dumps(header), data)


def with_header(header: str, data: bytes) -> bytes:
    """A safetensors file with any header text, padded as usual."""
    raw = header.encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def one_tensor(data: bytes = bytes(24), **changes: object) -> bytes:
    """A safetensors file with one float32 tensor "w" [2, 3] and changed header fields."""
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    return with_header(json.dumps({"w": entry}), data)


def gguf_string(text: str) -> bytes:
    """A length-prefixed string."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(kind: int, value: object) -> bytes:
    """A metadata value without its type; arrays are (item type, items)."""
    if kind == STRING:
        return gguf_string(value)
    if kind != ARRAY:
        return struct.pack(PACKING[kind], value)
    item_kind, items = value
    return struct.pack("<IQ", item_kind, len(items)) + b"".join(gguf_value(item_kind, item) for item in items)


def gguf_bytes(
    metadata: dict[str, tuple[int, object]],
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A valid GGUF file; tensors are (format, shape in NumPy's order, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        head += gguf_string(key) + struct.pack("<I", kind) + gguf_value(kind, value)
    data = b""
    for name, (format, shape, raw) in tensors.items():
        head += gguf_string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", GGML_TYPE[format], len(data))
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


def plain_tensors(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Float arrays in the form that gguf_bytes takes."""
    formats = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    return {name: (formats[array.dtype.name], array.shape, array.tobytes()) for name, array in tensors.items()}


def write(path: Path, content: bytes | str) -> Path:
    """Write a file and return its path."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_folder(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(exist_ok=True)
    write(folder / "model.safetensors", safetensors_bytes(tensors))
    write(folder / "config.json", json.dumps({"model_type": "qwen3", **config}))
    return folder
