"""F32: numbers of 32 bits."""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import k_major
from lockstep.formats.parts.products import FLOATS
from lockstep.formats.parts.scalars import byte, upper_half
from lockstep.formats.parts.tiles import float_steps
from lockstep.native.emit import read
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import load, store

NUMBER = np.dtype("<f4")
PANEL = np.dtype([("codes", NUMBER, FEATURES)])


def tile(s):
    """acc = fma(x[k], w[k], acc), k ascending."""
    return float_steps(s, PANEL.itemsize, lambda place: read(s.b, place, s.floats, PANEL.itemsize))


@definition
def weight(row_B, i):
    """Weight i of a row."""
    low = byte(row_B, 4 * i) | byte(row_B, 4 * i + 1) << 8
    return np.uint32(low | upper_half(row_B, 4 * i + 2)).view(np.float32)


@inlined
def store_weights(address, scale, out):
    """Stores sixteen weights times scale."""
    store(out, load(address) * scale)


F32 = Format(
    "f32",
    gguf_type=0,
    stored=Stored(NUMBER, 1, lambda values: (values,), lambda values: values, lambda values: values),
    packed=Packed(PANEL, 1, lambda values: {"codes": (k_major, values)}),
    product=FLOATS,
    tile=tile,
    lookup=Lookup(weight, store_weights, 16),
    is_choice=True,
    few_rows=2,
)
