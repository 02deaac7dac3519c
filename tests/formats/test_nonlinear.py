"""IQ4_NL and IQ4_XS against a second implementation of their layouts, weight by weight."""

from dataclasses import replace

import numpy as np
import pytest

from lockstep.formats import IQ4_NL, IQ4_XS, Q4_0

T = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(low, high):
    return np.frombuffer(bytes((low, high)), "<f2")[0].astype(np.float32)


def nonlinear(block):
    """18 bytes: d, then 16 of nibbles, the first 16 weights in the low ones."""
    d, codes = half(block[0], block[1]), [b & 15 for b in block[2:]] + [b >> 4 for b in block[2:]]
    return [d * np.float32(T[code]) for code in codes]


def nonlinear_with_scales(block):
    """136 bytes: d, 16 bits of high parts of scales, 4 bytes of low parts, and 8 times 16 bytes of nibbles."""
    d, high, weights = half(block[0], block[1]), block[2] | block[3] << 8, []
    for g in range(8):
        scale = ((block[4 + g // 2] >> 4 * (g % 2) & 15) | (high >> 2 * g & 3) << 4) - 32
        quants = block[8 + 16 * g : 24 + 16 * g]
        weights += [d * np.float32(scale) * np.float32(T[q & 15]) for q in quants]
        weights += [d * np.float32(scale) * np.float32(T[q >> 4]) for q in quants]
    return weights


@pytest.mark.parametrize("format, decode", [(IQ4_NL, nonlinear), (IQ4_XS, nonlinear_with_scales)], ids=["nl", "xs"])
def test_blocks_are_decoded_as_their_layout_says(format, decode):
    blocks = np.random.default_rng(3).integers(0, 256, (60, format.block_bytes), np.uint8)
    blocks[:, 1] &= 0xBB  # no exponent makes d infinite
    expected = np.array([decode(list(map(int, block))) for block in blocks], np.float32)
    assert format.dequantize(blocks).tobytes() == expected.tobytes()


def test_rows_that_blocks_of_256_do_not_fill_are_multiplied_as_bf16():
    assert IQ4_XS.fits(512) and not IQ4_XS.fits(288) and IQ4_XS.fallback == "bf16"
    assert IQ4_NL.fits(288) and not IQ4_NL.fits(40) and IQ4_NL.fallback == "f32"


def test_bytes_in_memory():
    """Bytes that decode reads: 4.5 bits a weight, as of q4_0, and 4.375."""
    assert IQ4_NL.panel_bytes(1024) == Q4_0.panel_bytes(1024) == 16 * 1024 * 4.5 / 8
    assert IQ4_XS.panel_bytes(1024) == 16 * 1024 * 4.375 / 8


def test_codes_that_do_not_begin_a_cache_line_are_refused():
    """A kernel's aligned loads would fault on them."""
    panel = np.dtype([("d", "<f2", 16), ("codes", "u1", (4, 16, 4))])
    with pytest.raises(ValueError, match="iq4_nl: codes at byte 32 of panels of 288, expected multiples of 64"):
        replace(IQ4_NL, packed=IQ4_NL.packed._replace(panel=panel))
