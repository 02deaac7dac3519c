"""F16: numbers of 16 bits, widened to float32 and multiplied as such."""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import k_major
from lockstep.formats.parts.products import FLOATS
from lockstep.formats.parts.scalars import half
from lockstep.formats.parts.tiles import float_steps
from lockstep.native import simd
from lockstep.native.emit import read, vector
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import load_f16, store

NUMBER = np.dtype("<f2")
PANEL = np.dtype([("codes", NUMBER, FEATURES)])


def tile(s):
    """acc = fma(x[k], w[k], acc), k ascending."""
    halves = vector(simd.F16, s.lanes)
    return float_steps(s, PANEL.itemsize, lambda place: s.b.fpext(read(s.b, place, halves, PANEL.itemsize), s.floats))


@definition
def weight(row_B, i):
    """Weight i of a row."""
    return half(row_B, 2 * i)


@inlined
def store_weights(address, scale, out):
    """Stores sixteen weights times scale."""
    store(out, load_f16(address) * scale)


F16 = Format(
    "f16",
    gguf_type=1,
    stored=Stored(
        NUMBER, 1, lambda values: (values,), lambda values: values.astype(np.float32), lambda v: v.astype(NUMBER)
    ),
    packed=Packed(PANEL, 1, lambda values: {"codes": (k_major, values)}),
    product=FLOATS,
    tile=tile,
    lookup=Lookup(weight, store_weights, 16),
    few_rows=2,
)
