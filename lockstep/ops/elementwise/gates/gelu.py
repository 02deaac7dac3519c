"""GELU by its approximation with a hyperbolic tangent, as activation of a gate."""

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.simd import fma, minimum
from lockstep.ops.math import EXP_HIGHEST, ONE, exp

SLOPE, CUBIC = np.float32(1.5957691216057308), np.float32(0.07135481627159596)  # 2 sqrt(2 / pi), and 0.044715 of that


@inlined
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 u).

    Error: below 3 ulp for x >= -1, below 5e-8 for less (where results go from -0.16 to 0).
    Order: s = x * x; double = x * fma(s, CUBIC, SLOPE); x / (1 + exp(min(-double, 88))).
    Source: Hendrycks and Gimpel 2016; `gelu_pytorch_tanh` in transformers.
    """
    double = x * fma(x * x, CUBIC, SLOPE)
    return x / (ONE + exp(minimum(-double, EXP_HIGHEST)))


@inlined
def gelu_tanh_gate(gate, up):
    """gelu_tanh(gate) * up.

    Order: one product. Source: Shazeer 2020 (GEGLU).
    """
    return gelu_tanh(gate) * up
