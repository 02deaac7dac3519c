#!/usr/bin/env python3
"""GGUF files with the layers of large models, few of them, at real widths, with random weights.

  make_layers.py [MODEL ...] [--out DIR] [--seed 0]

Weights are blocks that llama.cpp's own quantizer made of normal numbers: a pool of blocks for each format and size of
weights, from which each tensor draws, so that a file of gigabytes takes seconds. Runs with the interpreter of the
llama.cpp peer ($PEERS_DIR/venv-llama.cpp); the shapes are in layer_shapes.py.
"""

import ctypes
import os
import pathlib
import sys
import zlib

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import peers_common as pc
from layer_shapes import FEW_EXPERTS, FILES, format_of
from model_tensors import to_bf16
from options import Parser, one_of, whole_number

POOL = 1 << 21  # weights of a pool
CHUNK = 1 << 18  # blocks that are drawn at a time


def quantize(format, values):
    """Blocks uint8 [num, bytes] of float32 values, by GGML's quantizer."""
    import gguf
    import llama_cpp

    library = pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    size, num_bytes = gguf.GGML_QUANT_SIZES[format]
    chunk.restype, floats = ctypes.c_size_t, values.ctypes.data_as(ctypes.c_void_p)
    blocks = np.empty((values.size // size, num_bytes), np.uint8)
    rows = values.size // 4096
    written = chunk(
        ctypes.c_int(format), floats, blocks.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0),
        ctypes.c_int64(rows), ctypes.c_int64(4096), None,
    )  # fmt: skip
    if written != blocks.nbytes:
        sys.exit(f"quantizer wrote {written} bytes, expected {blocks.nbytes}")
    return blocks


class Weights:
    """Random tensors by name; each depends on the seed and the name only."""

    def __init__(self, seed, shape):
        self.seed, self.is_tied, self.pools = seed, shape.tied, {}
        self.is_gemma, self.is_gpt_oss = (shape.architecture.startswith(name) for name in ("gemma", "gpt-oss"))
        self.out_std = 0.02 / (2 * shape.layers) ** 0.5  # does not amplify rounding noise, as in model_tensors.py

    def rng(self, name):
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def std(self, name):
        if name.endswith(".bias") or "conv1d" in name or "sinks" in name:
            return {"ssm_dt": 1.0, "ssm_conv1d": 2.0, "attn_sinks": 1.0}.get(name.split(".")[2], 0.02)
        is_out = ("attn_output", "ssm_out", "ffn_down", "proj.weight")
        if "ffn_gate_inp" in name:
            return 0.1  # the last of the chosen experts weighs little: a rounding that chooses another shows little
        if "attn_k.weight" in name and self.is_gpt_oss:
            return 0.005  # keys without norms: scores of a size that does not pick single keys
        if name == "token_embd.weight" and not self.is_tied:
            return 0.3  # layers add to what a token is, and do not replace it: a rounding moves few choices of experts
        return self.out_std if any(part in name for part in is_out) and "model_proj" not in name else 0.02

    def plain(self, name, shape):
        """float32, in the ranges that trained models have"""
        rng = self.rng(name)
        if name.endswith("ssm_a"):
            return -rng.uniform(0.05, 4.0, shape).astype(np.float32)
        if name == "rope_freqs.weight":  # of 256 pairs 64 turn
            return np.where(np.arange(shape[0]) < shape[0] // 4, 1, 1e30).astype(np.float32)
        centre = 1 if "norm" in name or "output_scale" in name else 0
        std = 0.1 if centre else self.std(name)
        factor = shape[0] ** -0.5 if self.is_gemma and "attn_q_norm" in name else 1  # Gemma 4 does not scale scores
        return (factor * (centre + std * rng.standard_normal(shape))).astype(np.float32)

    def pool(self, format, std):
        """Blocks, uint8 [num, bytes]"""
        if (format, std) not in self.pools:
            values = self.rng(f"pool {format.name} {std}").standard_normal(POOL, np.float32) * np.float32(std)
            self.pools[format, std] = quantize(format, values)
        return self.pools[format, std]

    def blocks(self, name, num, format):
        """uint8 [num, bytes], drawn from a pool, in pieces"""
        pool, rng = self.pool(format, self.std(name)), self.rng(name)
        for start in range(0, num, CHUNK):
            yield pool[rng.integers(0, len(pool), min(CHUNK, num - start), np.int32)]


def write(path, name, shape, mixture, seed):
    import gguf

    writer, weights = gguf.GGUFWriter(path, shape.architecture), Weights(seed, shape)
    writer.add_name(f"{name} random")
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("no_vocab")
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in shape.metadata().items():
        kinds.get(type(value), writer.add_array)(f"{shape.architecture}.{key}", value)
    plan = [
        (tensor, dims, getattr(gguf.GGMLQuantizationType, format_of(mixture, tensor, len(dims), shape)))
        for tensor, dims in shape.tensors().items()
    ]
    for tensor, dims, format in plan:
        writer.add_tensor_info(tensor, dims, np.dtype(np.float32), num_bytes(tensor, dims, format), format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        for tensor, dims, format in plan:
            file.write(bytes(-file.tell() % 32))
            write_tensor(file, tensor, dims, format, weights)
        file.write(bytes(-file.tell() % 32))
    return plan


def num_bytes(name, dims, format):
    import gguf

    size, num = gguf.GGML_QUANT_SIZES[format]
    if dims[-1] % size:
        sys.exit(f"{name}: rows of {dims[-1]} are not whole blocks of {format.name}")
    return int(np.prod(dims, dtype=np.int64)) // size * num


def write_tensor(file, name, dims, format, weights):
    import gguf

    if format.name in ("F32", "BF16"):
        values = weights.plain(name, dims)
        file.write((values if format.name == "F32" else to_bf16(values)).tobytes())
        return
    num = int(np.prod(dims, dtype=np.int64)) // gguf.GGML_QUANT_SIZES[format][0]
    for piece in weights.blocks(name, num, format):
        file.write(piece.tobytes())


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        type=one_of(FILES | FEW_EXPERTS),
        default=list(FILES),
        help=f"of {', '.join(FILES | FEW_EXPERTS)}",
    )
    parser.add_argument("--out", default=os.path.join(pc.peers_dir(), "models"))
    parser.add_argument("--seed", type=whole_number(0), default=0)
    a = parser.parse_args()
    pc.enter("llama.cpp", 2)
    os.makedirs(a.out, exist_ok=True)
    for name in a.models:
        shape, mixtures = (FILES | FEW_EXPERTS)[name]
        for mixture in mixtures:
            path = os.path.join(a.out, f"{name}-{mixture}.gguf")
            plan = write(path, name, shape, mixture, a.seed)
            size = os.path.getsize(path) / 1e6
            print(f"{os.path.basename(path)}: {len(plan)} tensors, {size:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
