"""Rows of the embedding matrix, decoded from the bytes of the checkpoint: the definition.

out[t, i] = scale * table[token_id[t], i]
"""

from lockstep.formats import FORMATS
from lockstep.native.kernel import inlined, variant
from lockstep.native.machine import byte_array
from lockstep.native.numbers import carray, float32
from lockstep.native.simd import poke
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.operands import Operands, output, packed
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import StepBlock, entry, num_rows
from lockstep.weights.finite import MAPPED_BYTES, STORED_BYTES, finite_bytes

WEIGHT = SIZE = BLOCK_BYTES = None  # of a variant: decodes a row's weight i; weights and bytes of a block


class Embed(Operands):
    """out = scale * table[token id], row by row. num_rows: of a table that is shorter than the vocabulary, where tokens
    beyond it have row 0; 0: the table has a row for each token."""

    group = "embed"
    out: Tensor = output("width")
    table: Weight = packed()
    width: int
    scale: float
    num_rows: int = 0

    @property
    def kind(self):
        return f"{self.name()}_{self.table.format}"

    def check(self):
        if self.table.format not in FORMATS:
            allowed = ", ".join(FORMATS)
            raise ValueError(f"Embed: the table {self.table.name} is {self.table.format}, allowed are {allowed}")
        if self.table.shape[1:] != (self.width,) or self.width % FORMATS[self.table.format].block_size:
            found = f"the table {self.table.name} is {self.table.format} {list(self.table.shape)}"
            raise ValueError(f"Embed: {found}, expected whole blocks in rows of {self.width}")


class MappedEmbed(Embed):
    """The same for a table so large that it is not checked for NaN and infinity, which would read all of it: a step
    reads the rows of its tokens and no others. A row that has a NaN is found as logits that are not finite."""


def raw_bytes(weight):
    """The weight layout: uint8 [V, bytes] as stored, a copy. ValueError for a NaN or an infinity."""
    assert len(weight.parts) == 1, weight.name
    return (finite_bytes(weight.parts[0]),)


# Copies, where the file cannot be mapped.
RAW, MAPPED = Layout(STORED_BYTES, raw_bytes), Layout(MAPPED_BYTES, raw_bytes)


@inlined
def row_of(token, num_rows):
    """The row of a token; see `Embed`."""
    return 0 if 0 < num_rows <= token else token


@inlined
def row_bytes(width, size, block_bytes):
    """Bytes of a row of `width` weights, in blocks of `size`."""
    return width // size * block_bytes


def embed(op, step, thread, num_threads):
    """Looks up and decodes one row per token.

    Shapes: token_ids [T] int32; table [V, B] int8, rows of D weights in a block format or little-endian floats;
      out [T, D] float32; D a multiple of a block's weights.
    Error: one rounding for the product with scale, and one for adding the minimum in formats that have one.
    Order: w * scale, w as the format defines it: products of the block's float16 scale and small integers, each exact.
    Source: block_* in ggml-common.h.
    """
    a, token_ids = Embed.read(op), StepBlock.read(step).token_ids
    size = row_bytes(a.width, SIZE, BLOCK_BYTES)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        row = row_of(entry(token_ids, t), a.num_rows)
        row_B = carray(byte_array(a.table.codes + size * row), (size,))
        for i in range(a.width):
            poke(a.out + 4 * (a.width * t + i), float32(WEIGHT(row_B, i) * a.scale))


REFERENCE = {}
for _name, _format in FORMATS.items():
    _constants = dict(WEIGHT=_format.lookup.weight, SIZE=_format.block_size, BLOCK_BYTES=_format.block_bytes)
    globals()[f"embed_{_name}"] = variant(embed, f"embed_{_name}", **_constants)
    REFERENCE[f"embed_{_name}"] = Implementation(globals()[f"embed_{_name}"], RAW)
    REFERENCE[f"mapped_embed_{_name}"] = Implementation(globals()[f"embed_{_name}"], MAPPED)
