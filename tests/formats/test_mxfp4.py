"""MXFP4 against a second implementation of its layout, and at both ends of its scales."""

import numpy as np
import pytest

from lockstep.formats import MXFP4, Q4_0
from lockstep.formats.pack import pack
from lockstep.formats.parts.powers import E8M0, LARGEST, bytes_of, half_power, halves
from lockstep.native.kernel import interpreted
from lockstep.runtime.program import Weight
from lockstep.weights.tensor import StoredTensor

F = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def microscaled(block):
    """17 bytes: e, then 16 of nibbles, the first 16 weights in the low ones; the sign is a nibble's highest bit."""
    codes = [b & 15 for b in block[1:]] + [b >> 4 for b in block[1:]]
    return [2.0 ** (block[0] - 127) * F[q & 7] * (-1 if q >> 3 else 1) for q in codes]


def test_blocks_are_decoded_as_their_layout_says():
    blocks = np.random.default_rng(5).integers(0, 256, (LARGEST + 1, 17), np.uint8)
    blocks[:, 0] = np.arange(LARGEST + 1)
    expected = np.array([microscaled(list(map(int, block))) for block in blocks], np.float32) + np.float32(0)
    assert MXFP4.dequantize(blocks).tobytes() == expected.tobytes()  # + 0: there is no negative zero


def test_scales_of_every_byte():
    e = np.arange(256, dtype=np.uint8)
    exact = (2.0 ** (e.astype(np.float64) - 128)).astype(np.float32)
    assert (halves(e.view(E8M0)) == exact).all() and (bytes_of(exact) == e).all()
    for definition in (half_power, interpreted(half_power)):
        assert [definition(e.view(np.int8), i) for i in range(256)] == exact.tolist()


@pytest.mark.parametrize("e", [LARGEST + 1, 254, 255])
def test_scales_that_might_make_a_weight_infinite_are_refused(e):
    blocks = np.zeros((40, 2 * 17), np.uint8)
    blocks[:, 0], blocks[33, 17] = LARGEST, e
    tensor = StoredTensor("w", "mxfp4", (40, 64), blocks)
    with pytest.raises(ValueError, match=r"tensor 'w': expected finite block scales, found 1 .* index \[33, 1\]"):
        pack(MXFP4, Weight("w", "mxfp4", (40, 64), (tensor,)))


def test_bytes_in_memory():
    """4.25 bits a weight, as in a file."""
    assert MXFP4.panel_bytes(1024) == 16 * 1024 * 4.25 / 8 < Q4_0.panel_bytes(1024)
