"""Lookups of embeddings: every format decodes as it says, by definition and kernel."""

import numpy as np
import pytest

from lockstep.formats import FORMATS
from lockstep.formats.parts.e4m3 import E4M3, LARGEST
from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise import embed, embed_cpu
from lockstep.ops.elementwise.embed import Embed
from lockstep.runtime.program import Tensor, Weight
from lockstep.weights.tensor import StoredTensor, stored_shape
from tests.ops.harness import ragged_step, run_op, same_bits, weight

RNG = np.random.default_rng(0)
VOCABULARY = 50


def table(format, width):
    """A table with every code and sign, denormals among the block scales."""
    if not FORMATS[format].is_quantized:
        values = RNG.standard_normal((VOCABULARY, width)) * 10.0 ** RNG.integers(-7, 3, (VOCABULARY, width))
        data = values.astype(FORMATS[format].stored.block)
    else:
        shape, _ = stored_shape(format, (VOCABULARY, width))
        data = RNG.integers(0, 256, shape).astype(np.uint8)
        _finite_scales(data, FORMATS[format])
    return StoredTensor("embed", format, (VOCABULARY, width), data)


def _finite_scales(data, format):
    blocks = data.reshape(-1, format.block_bytes)
    for at, kind in format.scale_fields:
        # the byte with most of an exponent, and its bits
        high, infinite = {"f2": (at + 1, 0x7C), "f4": (at + 3, 0x7F)}.get(kind.str[1:], (at, 0xFC))
        blocks[:, high] = np.where(blocks[:, high] & infinite == infinite, 0, blocks[:, high])
        if kind == E4M3:
            blocks[:, at] %= LARGEST + 1


def run(backend, stored, ids, scale=1.0, num_threads=1):
    step, _held = ragged_step([len(ids)], token_ids=ids)
    sizes = dict(width=stored.shape[1], scale=scale)
    return run_op(backend, Embed, step, num_threads, table=weight(stored), **sizes)["out"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_decodes_as_the_format_says(format, num_tokens):
    stored = table(format, 512)
    ids = RNG.integers(0, VOCABULARY, num_tokens)
    ids[-1] = VOCABULARY - 1
    same_bits(run(embed.REFERENCE, stored, ids), stored.to_f32()[ids])
    same_bits(run(embed_cpu.CPU, stored, ids, num_threads=3), stored.to_f32()[ids])


@pytest.mark.parametrize("format", FORMATS)
def test_scaled_and_interpreted(format):
    stored, ids = table(format, 256), np.array([49, 3], np.int32)
    expected = stored.to_f32()[ids] * np.float32(22.6)
    same_bits(run(embed.REFERENCE, stored, ids, 22.6), expected)
    same_bits(run(embed_cpu.CPU, stored, ids, 22.6), expected)
    weight_of = interpreted(FORMATS[format].lookup.weight)
    raw = embed.raw_bytes(weight(stored))[0].view(np.int8)
    same_bits(np.array([[weight_of(raw[t], i) * np.float32(22.6) for i in range(256)] for t in ids]), expected)


def test_narrow_rows():
    for format in (name for name, format in FORMATS.items() if format.block_size <= 32):
        stored, ids = table(format, 32), np.arange(VOCABULARY)
        same_bits(run(embed_cpu.CPU, stored, ids, num_threads=2), stored.to_f32())


def test_tables_in_other_formats_or_of_broken_blocks_are_named():
    out, rows = Tensor("out", "T", 48), dict(width=48, scale=1.0)
    with pytest.raises(ValueError, match=r"Embed: the table w is i8, allowed are f32, f16"):
        Embed(out=out, table=Weight("w", "i8", (50, 48), ()), **rows)
    with pytest.raises(ValueError, match=r"Embed: the table w is q4_0 \[50, 48\], expected whole blocks in rows of 48"):
        Embed(out=out, table=Weight("w", "q4_0", (50, 48), ()), **rows)
