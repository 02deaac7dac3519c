"""The gates of gated MLPs, activation(gate) * up, by the name of the activation.

One formula for scalars and for lanes. A new activation is a function, in a file of its own unless it is short, and a
line in GATES, from which its ops are derived: the product, the product with prepared rows, and that of experts.
"""

from lockstep.native.kernel import inlined
from lockstep.ops.elementwise.gates.clamped_swiglu import clamped_swiglu_gate
from lockstep.ops.elementwise.gates.gelu import gelu_tanh_gate
from lockstep.ops.math import silu


@inlined
def silu_gate(gate, up):
    """silu(gate) * up.

    Error: below 3 ulp. Order: silu as in `math`, then one product. Source: Shazeer 2020 (SwiGLU).
    """
    return silu(gate) * up


GATES = {"silu": silu_gate, "gelu_tanh": gelu_tanh_gate, "clamped_swiglu": clamped_swiglu_gate}
