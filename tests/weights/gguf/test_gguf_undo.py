"""Conversion is undone in every format that a tensor may be stored in."""

import decimal

import ml_dtypes
import numpy as np
import pytest

from lockstep.formats import BLOCK_FORMATS
from lockstep.weights.gguf.undo import (
    ConvChannels,
    DecayLog,
    GroupedColumns,
    GroupedRows,
    HalfSplitRows,
    MinusOne,
    ValueHeads,
)
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


def logs_of(decays):
    heads = ValueHeads(1, len(decays))
    return DecayLog(heads).apply(StoredTensor("a", "f32", decays.shape, -decays)).data


def test_decays_become_the_bfloat16_that_they_were_made_of():
    sizes = np.arange(0x3A80, 0x4100, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)  # 2^-10 to 8
    logs = np.concatenate([sizes, -sizes])
    with decimal.localcontext(prec=2):  # as a caller may have set it
        assert logs_of(np.exp(logs.astype(np.float64)).astype(np.float32)).tobytes() == logs.tobytes()


def test_other_decays_become_the_nearest_logarithms():
    decays = np.random.default_rng(4).uniform(1e-3, 16, 1000).astype(np.float32)
    nearest = np.log(decays.astype(np.longdouble)).astype(np.float32)
    found = logs_of(decays)
    is_bfloat16 = found.view(np.uint32) % 65536 == 0
    assert found[~is_bfloat16].tobytes() == nearest[~is_bfloat16].tobytes() and is_bfloat16.sum() < 10


@pytest.mark.parametrize("decay", [0.0, -1.0, np.inf, np.nan])
def test_what_is_no_decay_is_named(decay):
    with pytest.raises(ValueError, match=r"tensor 'a': expected -exp\(A_log\), all negative and finite, found"):
        logs_of(np.array([1.0, decay], np.float32))


@pytest.mark.parametrize(
    "step, shape, said",
    [
        (GroupedColumns(HEADS), (1, 4, 64), "expected a matrix, found 3 dimensions"),
        (GroupedColumns(HEADS), (64,), "expected a matrix, found 1 dimensions"),
        (GroupedColumns(HEADS), (4, 65), "expected a multiple of 32 value heads, found 65"),
        (GroupedRows(HEADS), (33, 4), "expected a multiple of 32 value heads, found 33"),
        (ConvChannels(HEADS, 0), (32, 1, 4), "expected a matrix, found 3 dimensions"),
        (HalfSplitRows(4), (12, 8), "expected pairs of rows of 4 heads, found 12 rows"),
    ],
)
def test_tensors_of_another_shape_are_named(step, shape, said):
    with pytest.raises(ValueError, match=said):
        step.info(TensorInfo("v", "f32", shape, 0))
        step.apply(StoredTensor("v", "f32", shape, np.zeros(shape, np.float32)))
