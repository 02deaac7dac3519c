"""Linear layers, out = x W^T (+ residual): the definitions, one for each product of rows and weights.

Every output element is one chain of operations over K, in ascending order and never split: the chain does not depend on
the other rows and features that are computed. Each format has its own chain (`formats/parts/products.py` and the
formats' files); activations are prepared by `ops/elementwise/activations.py`.
"""

from functools import partial
from typing import ClassVar

from lockstep.formats import FORMATS
from lockstep.formats.pack import defined
from lockstep.formats.parts.panels import padded_width
from lockstep.formats.parts.products import Product
from lockstep.native.kernel import inlined, variant
from lockstep.native.numbers import float32
from lockstep.native.simd import peek, poke
from lockstep.ops.elementwise.activations import check_rows
from lockstep.ops.share import contiguous
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.operands import Operands, output, packed, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows

# constants of each variant: the bytes of a row of x, how a row is read, and its dot with a row of the weight
ROW_BYTES = READ = DOT = None
# by format of weights: the kind of the op that prepares rows for it; "" if rows are multiplied as they are
PREPARATION = {name: format.preparation for name, format in FORMATS.items()}
PRODUCTS = {format.product.name: format.product for format in FORMATS.values()}


class Linear(Operands):
    """out = x W^T (+ residual) in columns column .. column + out_features - 1; W [out_features, in_features].

    out, residual [rows, width]. format: "" as recorded, where x is float32 [rows, in_features]; once lowered, the
    weight's format, for which x is prepared. Kernels write whole panels: zeros (+ residual) up to a multiple of 16
    columns.
    """

    group = "linear"
    multiplied: ClassVar[dict[str, str]] = {
        "x": "weight"
    }  # the operand of rows, and the weight for which they are prepared
    out: Tensor = output("width")
    x: Tensor = rows(dtype=None)
    weight: Weight = packed("out_features, in_features")
    residual: Tensor | None = rows("width", optional=True)
    in_features: int
    out_features: int
    width: int
    column: int
    format: str = ""

    @property
    def kind(self):
        return f"{self.name()}_{self.format}" if self.format else self.name()

    @property
    def row_values(self):
        """How many values a row of x has."""
        return self.in_features

    def flops(self, context):
        return 2 * self.in_features * self.out_features

    def columns(self, tensor):
        if tensor not in (self.out, self.residual):
            return None
        return range(self.column, self.column + padded_width(self.out_features))

    def check(self):
        name = type(self).__name__
        if self.format not in ("", self.weight.format):
            raise ValueError(f"{name}: format is {self.format!r}, expected that of the weight, {self.weight.format!r}")
        check_rows(self, "x", PREPARATION[self.format] if self.format else "", self.row_values)
        block = FORMATS[self.weight.format].block_size if self.weight.format in FORMATS else 1
        if not 0 < self.in_features or self.in_features % block:
            raise ValueError(f"{name}: in_features is {self.in_features}, expected a positive multiple of {block}")
        if self.column % 16 or self.column + padded_width(self.out_features) > self.width:
            raise ValueError(
                f"{name}: {self.out_features} features from column {self.column} on do not fit a row of {self.width} "
                f"in whole panels of 16"
            )


@inlined
def finish(a, t, n, value):
    """Adds the residual, if the layer has one, and stores feature n of row t."""
    place = 4 * (a.width * t + a.column + n)
    poke(a.out + place, float32(peek(a.residual + place, float32) + value if a.residual else value))


def _linear(op, step, thread, num_threads):
    """Row by row; each thread has a contiguous share of the features, with zeros up to whole panels."""
    a = Linear.read(op)
    for t in range(num_rows(op, step)):
        x = READ(a.x + ROW_BYTES(a.in_features) * t, a.in_features)
        for n in contiguous((a.out_features + 15) // 16 * 16, thread, num_threads):
            finish(a, t, n, DOT(x, a.weight, n, a.in_features))


def constants(product: Product) -> dict:
    """The constants of a variant of a definition for a product."""
    return dict(READ=product.rows.read, ROW_BYTES=product.rows.num_bytes, DOT=product.dot)


LAYOUTS = {
    name: Layout(f"{name} rows", partial(defined, format), format.product.arrays) for name, format in FORMATS.items()
}
for _name, _product in PRODUCTS.items():
    globals()[f"_linear_{_name}"] = variant(_linear, f"_linear_{_name}", **constants(_product))
REFERENCE = {
    f"linear_{name}": Implementation(globals()[f"_linear_{format.product.name}"], LAYOUTS[name])
    for name, format in FORMATS.items()
}
