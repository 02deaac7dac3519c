"""Records in block_vectors.json with the gguf package: python -m tests.formats.record_block_vectors

Random blocks and the weights that gguf.quants decodes from them; random weights and the blocks that it encodes.
"""

import json
import zlib
from pathlib import Path

import numpy as np

BLOCK_BYTES = {
    "Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_NL": 18,
    "IQ4_XS": 136, "Q2_K": 84, "Q3_K": 110, "MXFP4": 17,
    "NVFP4": 36,
}  # fmt: skip
# Bytes with the exponents of scales: without one exponent bit they are never NaN or infinite. NVFP4's have no sign.
HIGH_BYTES = {
    "Q4_1": (1, 3), "Q5_1": (1, 3), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,), "Q2_K": (81, 83), "Q3_K": (109,),
    "MXFP4": (), "NVFP4": (0, 1, 2, 3),
}  # fmt: skip


def random_blocks(name: str, num_blocks: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [2, num_blocks / 2 * block_bytes], two rows of blocks with random codes and finite scales."""
    blocks = rng.integers(0, 256, (num_blocks, BLOCK_BYTES[name]), np.uint8)
    for offset in HIGH_BYTES.get(name, (1,)):
        blocks[:, offset] &= 0x3B if name == "NVFP4" else 0xBB
    return blocks.reshape(2, -1)


def awkward_weights(rng: np.random.Generator) -> np.ndarray:
    """float32 [3, 128] with a block of zeros, ties, halves and a signed pair of equal magnitude."""
    weights = rng.standard_normal((3, 128)).astype(np.float32)
    weights[0, :32] = 0
    weights[0, 32:64] = np.arange(32) - 15.5
    weights[1, :2] = 7, -7
    weights[1, 32:34] = -7, 7
    weights[2, :32] = 127 * np.sign(weights[2, :32])
    weights[2, 1:17] = np.arange(16) + 0.5
    return weights


def main() -> None:
    """Adds vectors for formats without any to the file beside this one."""
    from gguf import GGMLQuantizationType, quants

    path = Path(__file__).with_name("block_vectors.json")
    vectors = json.loads(path.read_text())
    for name in BLOCK_BYTES:
        if name.lower() not in vectors["dequantize"]:
            packed = random_blocks(name, 4, np.random.default_rng(zlib.crc32(name.encode())))
            weights = quants.dequantize(packed, GGMLQuantizationType[name]).astype("<f4")
            vectors["dequantize"][name.lower()] = {"packed": packed.tobytes().hex(), "weights": weights.tobytes().hex()}
    weights = np.frombuffer(bytes.fromhex(vectors["weights"]), "<f4").reshape(3, 128)
    for name in ("Q8_0", "Q4_0"):
        vectors["quantize"][name.lower()] = quants.quantize(weights, GGMLQuantizationType[name]).tobytes().hex()
    path.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
