"""Q2_K and Q3_K against a second implementation of their layouts, weight by weight."""

import numpy as np
import pytest

from lockstep.formats import Q2_K, Q3_K, Q4_K
from tests.formats.test_nonlinear import half


def two_bits(quants, i):
    """Two bits of weight i of 256; 64 bytes, of which each 32 hold 128 weights."""
    return quants[32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3


def with_minima(block):
    """84 bytes: 16 of scales and minima, 64 of codes, d and dmin."""
    d, dmin = half(*block[80:82]), half(*block[82:84])
    scales = [(np.float32(s & 15), np.float32(s >> 4)) for s in block[:16]]
    codes = [np.float32(two_bits(block[16:80], i)) for i in range(256)]
    return [d * scales[i // 16][0] * code - dmin * scales[i // 16][1] for i, code in enumerate(codes)]


def without_minima(block):
    """110 bytes: 32 of third bits, 64 of low ones, 12 of scales, d."""
    d, packed, weights = half(*block[108:110]), block[96:108], []
    scales = [packed[j] & 15 for j in range(8)] + [packed[j] >> 4 for j in range(8)]
    scales = [(s | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32 for j, s in enumerate(scales)]
    for i in range(256):
        code = two_bits(block[32:96], i) - (0 if block[i % 32] >> i // 32 & 1 else 4)
        weights.append(d * np.float32(scales[i // 16]) * np.float32(code))
    return weights


@pytest.mark.parametrize("format, decode", [(Q2_K, with_minima), (Q3_K, without_minima)], ids=["q2_k", "q3_k"])
def test_blocks_are_decoded_as_their_layout_says(format, decode):
    blocks = np.random.default_rng(3).integers(0, 256, (60, format.block_bytes), np.uint8)
    for start, _ in format.scale_fields:
        blocks[:, start + 1] &= 0xBB  # no exponent makes a scale infinite
    expected = np.array([decode(list(map(int, block))) for block in blocks], np.float32)
    assert format.dequantize(blocks).tobytes() == expected.tobytes()


def test_the_largest_products_of_scale_and_code_fit_a_byte():
    """Scales of -32 and codes of -4, whose product, 128, is the largest: the panel has what the file has."""
    block = np.zeros((1, 110), np.uint8)
    block[0, 108:] = np.array([0.5], "<f2").view(np.uint8)
    assert (Q3_K.dequantize(block) == 0.5 * 128).all()
    codes, sc, d = Q3_K.split(block)
    assert (codes == -4).all() and (sc == 32).all() and (d == -0.5).all()
    assert ((128 + sc.astype(int)[:, :, None] * codes.reshape(1, 16, 16)) == 0).all()


def test_bytes_in_memory():
    """Bytes that decode reads: as many bits a weight as the file has for Q2_K, and 3/16 more for Q3_K."""
    assert Q2_K.panel_bytes(1024) == 16 * 1024 * 2.625 / 8
    assert Q3_K.panel_bytes(1024) == 16 * 1024 * 3.625 / 8 < Q4_K.panel_bytes(1024)
