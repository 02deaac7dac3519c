"""A block-diagonal linear layer: each group of a row's values has weights of its own. The definition.

    out[t, g N + n] = x[t, g K .. (g + 1) K] . W[g N + n]        G groups of K values and N features

Used as the first half of a low-rank projection of attention's output (DeepSeek-V4: 8 groups of 4096 values to 1024
features, then 8192 to 4096), whose second half reads the rows of out as they are. Every element is what
`ops/linear/linear.py` defines for its group's values and its row of the weight.
"""

from lockstep.formats import FORMATS
from lockstep.native.kernel import variant
from lockstep.ops.linear.linear import LAYOUTS, PRODUCTS, Linear, constants, finish
from lockstep.ops.share import contiguous
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

ROW_BYTES = READ = DOT = None  # constants of each variant, as in `ops/linear/linear.py`


class GroupedLinear(Linear):
    """`Linear` on `groups` groups: of in_features values in a row of x, and of rows of W [out_features, in_features].

    Groups have the same number of features, a multiple of 32.
    """

    group = "grouped_linear"
    rules = ("out_features % (32 * groups) == 0",)  # 32: the features of the widest tile
    groups: int

    @property
    def row_values(self):
        return self.groups * self.in_features


def _grouped_linear(op, step, thread, num_threads):
    """Row by row and group by group; each thread has a contiguous share of the features."""
    a = GroupedLinear.read(op)
    K, N = a.in_features, a.out_features // a.groups
    for t in range(num_rows(op, step)):
        for g in range(a.groups):
            x = READ(a.x + ROW_BYTES(K) * (a.groups * t + g), K)
            for n in contiguous(N, thread, num_threads):
                finish(a, t, N * g + n, DOT(x, a.weight, N * g + n, K))


for _name, _product in PRODUCTS.items():
    globals()[f"_grouped_linear_{_name}"] = variant(_grouped_linear, f"_grouped_linear_{_name}", **constants(_product))
REFERENCE = {
    f"grouped_linear_{name}": Implementation(globals()[f"_grouped_linear_{format.product.name}"], LAYOUTS[name])
    for name, format in FORMATS.items()
}
