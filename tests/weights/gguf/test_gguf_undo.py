"""Conversion is undone in every format that a tensor may be stored in."""

import numpy as np
import pytest

from lockstep.formats import BLOCK_FORMATS
from lockstep.weights.gguf.undo import DecayLog, GroupedRows, HalfSplitRows, MinusOne, ValueHeads
from lockstep.weights.tensor import StoredTensor, TensorInfo

HEADS = ValueHeads(16, 32)
STEPS = [MinusOne(), DecayLog(HEADS), GroupedRows(HEADS), GroupedRows(HEADS, 32), HalfSplitRows(4)]


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "iq4_nl"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_a_vector_of_blocks_is_undone_as_its_values_are(step, format):
    data = np.random.default_rng(1).integers(1, 120, (2, BLOCK_FORMATS[format].block_bytes), np.uint8)
    values = BLOCK_FORMATS[format].dequantize(data).ravel()
    if isinstance(step, DecayLog):  # all negative: the smallest code of each value's scale
        data[:, 2:] = 0x81 if format == "q8_0" else 0x11
        values = BLOCK_FORMATS[format].dequantize(data).ravel()
    blocks, plain = (StoredTensor("v", f, (64,), d) for f, d in ((format, data.ravel()), ("f32", values)))
    made, expected = step.apply(blocks), step.apply(plain)
    info = step.info(TensorInfo("v", format, (64,), data.nbytes))
    assert made.format == info.format == "f32" and made.shape == info.shape and made.data.nbytes == info.num_bytes
    assert made.data.tobytes() == expected.data.tobytes() and not made.data.flags.writeable


def test_one_is_taken_from_a_norm_within_half_a_spacing():
    sums = np.float32(1) + np.random.default_rng(2).normal(0, 3, 1000).astype(np.float32)
    others = np.random.default_rng(3).uniform(0, 0.5, 1000).astype(np.float32)
    again = [MinusOne().apply(StoredTensor("n", "f32", s.shape, s)).data + np.float32(1) for s in (sums, others)]
    assert again[0].tobytes() == sums.tobytes()
    assert 0 < np.abs(again[1].astype(np.float64) - others).max() <= 2.0**-25
