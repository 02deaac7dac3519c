"""Live comparison with TICO's observers, with fresh seeds: scales, zero points and rounded numbers, bit for bit.

The seed of a failure is in its message, LOCKSTEP_SEED repeats it.
"""

import os
import secrets

import numpy as np
import pytest

from lockstep.ops.rounded import grids
from lockstep.ptq.spec import Spec
from lockstep.ptq.weights import fold
from tests.ptq.test_observers import seen

torch = pytest.importorskip("torch")
minmax = pytest.importorskip("tico.quantization.wrapq.observers.minmax", reason="TICO 0.3.0 is needed")
dtypes = pytest.importorskip("tico.quantization.wrapq.dtypes")
schemes = pytest.importorskip("tico.quantization.wrapq.qscheme").QScheme

SEED = int(os.environ.get("LOCKSTEP_SEED") or secrets.randbelow(1 << 30))
RNG = np.random.default_rng(SEED)
NUM_TENSORS = 50
CONSTANTS = [0, 1e-8, -1e-8, 1.1e-8, -2e-9, 5e-9, 3e-8, 1, -0.3]


def tensors():
    """Random tensors of many magnitudes: of both signs, of one sign, constant, and far from zero."""
    for n in range(NUM_TENSORS):
        x = (RNG.standard_normal((7, 64)) * np.exp2(RNG.integers(-30, 20))).astype(np.float32)
        yield [x, np.abs(x), -np.abs(x), x + np.float32(1000), np.full_like(x, RNG.choice(CONSTANTS))][n % 5]


def theirs(x, letter, bits, axis=None):
    """TICO's (scales, zero points, rounded numbers)."""
    scheme = {"i": schemes.PER_TENSOR_SYMM, "u": schemes.PER_TENSOR_ASYMM}[letter]
    observer = minmax.MinMaxObserver(
        name="x",
        dtype=dtypes.DType.int(bits) if letter == "i" else dtypes.DType.uint(bits),
        qscheme=scheme if axis is None else schemes.PER_CHANNEL_ASYMM,
        channel_axis=axis,
    )
    observer.collect(torch.from_numpy(x))
    scale, zero = observer.compute_qparams()
    return scale.numpy().ravel(), zero.numpy().ravel(), observer.fake_quant(torch.from_numpy(x)).numpy()


def same(found, expected):
    for ours, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, other, err_msg=f"seed {SEED}")


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("letter", "iu")
def test_activations(letter, bits):
    for x in tensors():
        [row] = seen(x).solve(Spec.parse(f"{letter}{bits}"))
        rounded = x.copy().ravel()
        grids.quantize_row(rounded, row)
        same((row[[grids.SCALE]], row[[grids.ZERO_POINT]], rounded.reshape(x.shape)), theirs(x, letter, bits))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("letter, per, axis", [("i", "tensor", None), ("u", "tensor", None), ("u", "row", 0)])
def test_weights(letter, per, axis, bits):
    for x in tensors():
        made = fold(x, Spec.parse(f"{letter}{bits}/{per}"))
        assert made.scale is not None and made.zero is not None
        same((made.scale.ravel(), made.zero.ravel(), made.values), theirs(x, letter, bits, axis))
