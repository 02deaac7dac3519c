"""GROUP4, GROUP8 and CHANNEL8 against a second implementation of their layouts, weight by weight."""

import numpy as np
import pytest

from lockstep.formats import CHANNEL8, GROUP4, GROUP8, Q4_0
from lockstep.formats.groups import channel8, group4, group8
from lockstep.formats.groups.rows import format_of, stored_rows

RNG = np.random.default_rng(5)


def number(block, at):
    return np.frombuffer(bytes(block[at : at + 4]), "<f4")[0]


def four_bits(block):
    """40 bytes: d, m, 32 of nibbles, the first 32 weights in the low ones."""
    codes = [b & 15 for b in block[8:]] + [b >> 4 for b in block[8:]]
    return [number(block, 0) * np.float32(code) + number(block, 4) for code in codes]


def eight_bits(block):
    """40 bytes: d, m, 32 codes."""
    return [number(block, 0) * np.float32(code) + number(block, 4) for code in block[8:]]


def signed_bits(block):
    """36 bytes: d, 32 signed codes."""
    return [number(block, 0) * np.float32(code - 256 * (code > 127)) for code in block[4:]]


DECODED = [(GROUP4, four_bits), (GROUP8, eight_bits), (CHANNEL8, signed_bits)]


@pytest.mark.parametrize("format, decode", DECODED, ids=["4", "8", "channel"])
def test_blocks_are_decoded_as_their_layout_says(format, decode):
    blocks = RNG.integers(0, 256, (60, format.block_bytes), np.uint8)
    format.put_scales(blocks, RNG.standard_normal(60))
    expected = np.array([decode(list(map(int, block))) for block in blocks], np.float32)
    assert format.dequantize(blocks).tobytes() == expected.tobytes()


@pytest.mark.parametrize("format, make, codes", [(GROUP4, group4, 16), (GROUP8, group8, 256)], ids=["4", "8"])
def test_rows_of_codes_and_scales(format, make, codes):
    values = RNG.integers(0, codes, (3, 192)).astype(np.uint8)
    d, m = RNG.standard_normal((2, 3, 192 // format.block_size)).astype(np.float32)
    wide = lambda scales: np.repeat(scales, format.block_size, axis=1)
    expected = wide(d) * values.astype(np.float32) + wide(m)
    assert format.dequantize(make.stored_rows(values, d, m)).tobytes() == expected.tobytes()


def test_the_format_of_a_group():
    assert [format_of(bits, group).name for bits, group in ((4, 64), (3, 128), (4, 32), (4, 96), (8, 64), (6, 32))] == [
        "group4", "group4", "group8", "group8", "group8", "group8",
    ]  # fmt: skip
    for bits, group in ((4, 16), (4, 0), (4, -32), (9, 64), (0, 64), (4, 48)):
        with pytest.raises(ValueError, match=f"codes of {bits} bits in groups of {group} are not supported"):
            format_of(bits, group)


def test_a_group_of_several_blocks_repeats_its_scales():
    codes, d, m = RNG.integers(0, 16, (2, 256)).astype(np.uint8), *RNG.standard_normal((2, 2, 2)).astype(np.float32)
    expected = np.repeat(d, 128, axis=1) * codes.astype(np.float32) + np.repeat(m, 128, axis=1)
    for format in (GROUP4, GROUP8):
        assert format.dequantize(stored_rows(format, codes, d, m)).tobytes() == expected.tobytes()


def test_bytes_in_memory():
    """Bytes that decode reads: 5 and 10 bits a weight."""
    assert GROUP4.panel_bytes(1024) == 16 * 1024 * 5 / 8 == Q4_0.panel_bytes(1024) * 5 / 4.5
    assert GROUP8.panel_bytes(1024) == 16 * 1024 * 10 / 8
    assert CHANNEL8.panel_bytes(1024) == 16 * (1024 + 4)


def test_rows_with_one_scale():
    codes, d = RNG.integers(-128, 128, (3, 96)).astype(np.int8), np.float32([[0.5], [-3e-5], [0.0]])
    rows = channel8.stored_rows(codes, d)
    assert CHANNEL8.dequantize(rows).tobytes() == (codes * d).tobytes()
    unpacked, scales = CHANNEL8.split(rows)
    assert unpacked.tobytes() == codes.tobytes() and (scales == d).all()
    rows[1, 36:40] = 1
    with pytest.raises(ValueError, match="a row has several scales, expected one"):
        CHANNEL8.split(rows)
