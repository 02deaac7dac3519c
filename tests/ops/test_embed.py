import numpy as np
import pytest

from lockstep.ops import embed, embed_cpu
from lockstep.ops.embed import Embed
from lockstep.runtime.kernel import interpreted
from lockstep.weights.tensor import BLOCK_FORMATS, PLAIN_FORMATS, StoredTensor, stored_shape
from tests.ops.harness import ragged_step, run_op, same_bits, weight
from tests.weights.record_block_vectors import HIGH_BYTES

RNG = np.random.default_rng(0)
VOCABULARY = 50


def table(format, width):
    """A table with every code and sign, float16 denormals among the block scales."""
    if format in PLAIN_FORMATS:
        values = RNG.standard_normal((VOCABULARY, width)) * 10.0 ** RNG.integers(-7, 3, (VOCABULARY, width))
        data = values.astype(PLAIN_FORMATS[format])
    else:
        shape, _ = stored_shape(format, (VOCABULARY, width))
        data = RNG.integers(0, 256, shape).astype(np.uint8)
        _finite_scales(data, format)
    return StoredTensor("embed", format, (VOCABULARY, width), data)


def _finite_scales(data, format):
    code = embed.format_code(format)
    blocks = data.reshape(-1, embed.BLOCK_BYTES[code])
    for high_byte in HIGH_BYTES.get(format.upper(), (1,)):
        blocks[:, high_byte] = np.where(blocks[:, high_byte] & 0x7C == 0x7C, 0, blocks[:, high_byte])


def run(backend, stored, ids, scale=1.0, num_threads=1):
    step, _held = ragged_step([len(ids)], token_ids=ids)
    how = dict(width=stored.shape[1], format=embed.format_code(stored.format), scale=scale)
    return run_op(backend, Embed, step, num_threads, table=weight(stored), **how)["out"]


@pytest.mark.parametrize("format", embed.FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_decodes_as_the_format_says(format, num_tokens):
    stored = table(format, 512)
    ids = RNG.integers(0, VOCABULARY, num_tokens)
    ids[-1] = VOCABULARY - 1
    same_bits(run(embed.REFERENCE, stored, ids), stored.to_f32()[ids])
    same_bits(run(embed_cpu.CPU, stored, ids, num_threads=3), stored.to_f32()[ids])


@pytest.mark.parametrize("format", embed.FORMATS)
def test_scaled_and_interpreted(format):
    stored, ids = table(format, 256), np.array([49, 3], np.int32)
    expected = stored.to_f32()[ids] * np.float32(22.6)
    same_bits(run(embed.REFERENCE, stored, ids, 22.6), expected)
    same_bits(run(embed_cpu.CPU, stored, ids, 22.6), expected)
    out = np.empty((2, 256), np.float32)
    raw = embed.raw_bytes(weight(stored))[0].view(np.int8)
    interpreted(embed.embed)(ids, raw, embed.format_code(format), np.float32(22.6), out)
    same_bits(out, expected)


def test_narrow_rows():
    for format in (f for f in embed.FORMATS if not f.endswith("_k")):
        stored, ids = table(format, 32), np.arange(VOCABULARY)
        same_bits(run(embed_cpu.CPU, stored, ids, num_threads=2), stored.to_f32())


def test_every_block_format_has_a_decoder():
    assert set(BLOCK_FORMATS) <= set(embed.FORMATS)


def test_other_formats_are_named():
    with pytest.raises(ValueError, match=r"i8.*f32, bf16"):
        embed.format_code("i8")
