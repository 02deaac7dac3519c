"""Block formats against vectors recorded with the gguf package, and against the package where it is installed."""

import json
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lockstep.formats import BLOCK_FORMATS, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0
from lockstep.formats.parts import blocks
from tests.formats.record_block_vectors import awkward_weights, random_blocks

OF_GGUF = [name for name, format in BLOCK_FORMATS.items() if format.gguf_type is not None]
VECTORS = json.loads(Path(__file__).with_name("block_vectors.json").read_text())


def bits(array):
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def recorded(name, block):
    vector = VECTORS["dequantize"][name]
    packed = np.frombuffer(bytes.fromhex(vector["packed"]), np.uint8).reshape(2, 2 * block.block_bytes)
    return packed, np.frombuffer(bytes.fromhex(vector["weights"]), "<f4").reshape(2, 2 * block.block_size)


@pytest.mark.parametrize("name", OF_GGUF)
def test_dequantize_gives_the_recorded_bits(name):
    packed, expected = recorded(name, BLOCK_FORMATS[name])
    assert (bits(BLOCK_FORMATS[name].dequantize(packed)) == bits(expected)).all()


@pytest.mark.parametrize("block", [Q8_0, Q4_0])
def test_quantize_gives_the_recorded_bytes(block):
    weights = np.frombuffer(bytes.fromhex(VECTORS["weights"]), "<f4").reshape(3, 128)
    expected = np.frombuffer(bytes.fromhex(VECTORS["quantize"][block.name]), np.uint8)
    assert (block.quantize(weights).ravel() == expected).all()


@pytest.mark.parametrize("name", OF_GGUF)
def test_against_the_gguf_package(name):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng()
    packed = random_blocks(name.upper(), 64, rng)
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name.upper()])
    assert (bits(BLOCK_FORMATS[name].dequantize(packed)) == bits(expected)).all()
    if BLOCK_FORMATS[name].stored.encode:
        weights = awkward_weights(rng)
        assert (BLOCK_FORMATS[name].quantize(weights) == gguf.quants.quantize(
            weights, gguf.GGMLQuantizationType[name.upper()])).all()  # fmt: skip


def test_split_q8_0():
    packed, weights = recorded("q8_0", Q8_0)
    codes, scales = Q8_0.split(packed)
    assert codes.dtype == np.int8 and codes.shape == (2, 64) and scales.shape == (2, 2)
    assert (codes * np.repeat(scales, 32, 1).astype(np.float32) == weights).all()


def test_split_q4_0():
    packed, weights = recorded("q4_0", Q4_0)
    codes, scales = Q4_0.split(packed)
    assert codes.dtype == np.uint8 and codes.max() == 15 and scales.shape == (2, 2)
    assert ((codes.astype(np.float32) - 8) * np.repeat(scales, 32, 1).astype(np.float32) == weights).all()


def test_split_q5_0():
    packed, weights = recorded("q5_0", Q5_0)
    codes, scales = Q5_0.split(packed)
    assert codes.dtype == np.uint8 and codes.max() == 31 and scales.shape == (2, 2)
    assert ((codes.astype(np.float32) - 16) * np.repeat(scales, 32, 1).astype(np.float32) == weights).all()


@pytest.mark.parametrize(("block", "name", "largest"), [(Q4_1, "q4_1", 15), (Q5_1, "q5_1", 31)])
def test_split_into_codes_a_scale_and_a_minimum(block, name, largest):
    packed, weights = recorded(name, block)
    codes, d, m = block.split(packed)
    assert codes.dtype == np.uint8 and codes.max() == largest and d.shape == m.shape == (2, 2)
    scale, minimum = (np.repeat(field.astype(np.float32), 32, 1) for field in (d, m))
    assert (scale * codes + minimum == weights).all()


@pytest.mark.parametrize(("block", "name", "largest"), [(Q4_K, "q4_k", 15), (Q5_K, "q5_k", 31)])
def test_split_into_codes_and_scales_of_scales(block, name, largest):
    packed, weights = recorded(name, block)
    codes, d, dmin, scales, minima = block.split(packed)
    assert codes.max() == largest
    assert codes.shape == (2, 512) and d.shape == dmin.shape == (2, 2) and scales.shape == minima.shape == (2, 16)
    assert codes.dtype == scales.dtype == minima.dtype == np.uint8 and scales.max() < 64 and minima.max() < 64
    scale = np.repeat(d.astype(np.float32), 8, 1) * scales
    minimum = np.repeat(dmin.astype(np.float32), 8, 1) * minima
    assert (np.repeat(scale, 32, 1) * codes - np.repeat(minimum, 32, 1) == weights).all()


def test_split_q6_k():
    packed, weights = recorded("q6_k", Q6_K)
    codes, scales, d = Q6_K.split(packed)
    assert codes.dtype == scales.dtype == np.int8 and codes.min() >= -32 and codes.max() <= 31
    assert codes.shape == (2, 512) and scales.shape == (2, 32) and d.shape == (2, 2)
    scale = np.repeat(d.astype(np.float32), 16, 1) * scales
    assert (np.repeat(scale, 16, 1) * codes == weights).all()


def test_leading_axes_are_kept():
    packed = np.zeros((3, 5, 2 * Q6_K.block_bytes), np.uint8)
    assert Q6_K.dequantize(packed).shape == (3, 5, 512)
    assert [field.shape for field in Q6_K.split(packed)] == [(3, 5, 512), (3, 5, 32), (3, 5, 2)]
    assert Q8_0.quantize(np.zeros((3, 5, 64), np.float32)).shape == (3, 5, 68)


def test_no_rows():
    assert Q8_0.dequantize(np.zeros((0, 34), np.uint8)).shape == (0, 32)
    assert Q4_0.quantize(np.zeros((0, 32), np.float32)).shape == (0, 18)


@pytest.mark.parametrize("block", BLOCK_FORMATS.values())
def test_bad_rows_are_refused(block):
    with pytest.raises(ValueError, match="whole blocks"):
        block.dequantize(np.zeros((2, block.block_bytes + 1), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        block.dequantize(np.zeros((2, block.block_bytes), np.int8))


def test_weights_too_large_for_a_float16_scale():
    with pytest.raises(ValueError, match="float16"):
        Q8_0.quantize(np.full((1, 32), 1e9, np.float32))


finite = st.floats(-1000, 1000, width=32)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (2, 32), elements=finite))
def test_q8_0_error_is_half_a_code(weights):
    packed = Q8_0.quantize(weights)
    scale = np.abs(weights).max(axis=1, keepdims=True) / 127
    # Half a code, the rounding of 127 codes' scale to float16, and the denormal scales' steps.
    allowed = scale * (0.501 + 127 / 2048) + 127 * 2.0**-25
    assert (np.abs(Q8_0.dequantize(packed) - weights) <= allowed).all()


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (2, 32), elements=finite))
def test_q4_0_error_is_a_code(weights):
    scale = np.abs(weights).max(axis=1, keepdims=True) / 8
    allowed = scale * (1.001 + 8 / 2048) + 8 * 2.0**-25
    assert (np.abs(Q4_0.dequantize(Q4_0.quantize(weights)) - weights) <= allowed).all()


@settings(max_examples=200, deadline=None)
@given(st.floats(-300, 300, width=32) | st.integers(-300, 300).map(lambda n: n + 0.5))
def test_round_half_away_is_roundf(value):
    rounded = float(blocks.round_half_away(np.array([value], np.float32))[0])
    exact = Fraction(float(np.float32(value)))
    away = int(abs(exact) + Fraction(1, 2)) * (1 if exact >= 0 else -1)
    assert rounded == away


def test_dequantize_needs_little_more_than_its_result():
    packed = np.zeros((4096, 8 * Q4_K.block_bytes), np.uint8)
    tracemalloc.start()
    weights = Q4_K.dequantize(packed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < weights.nbytes + (16 << 20)
