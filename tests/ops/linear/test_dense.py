"""bf16 in 12 bits: the same numbers, and the same bits of every product, as plain panels."""

import ml_dtypes
import numpy as np
import pytest

from lockstep.formats import FORMATS
from lockstep.formats.pack import pack, pack_dense
from lockstep.formats.parts import dense_bf16 as dense
from lockstep.ops.linear import linear, linear_cpu
from lockstep.runtime.program import Weight
from lockstep.weights.tensor import StoredTensor
from tests.ops.harness import same_bits
from tests.ops.linear.test_linear import run

BF16 = FORMATS["bf16"]


def values(N, K, num_odd):
    """bf16 weights with few exponents, but for num_odd in each block of a panel, zeros and denormals among them."""
    rng = np.random.default_rng([N, K, num_odd])
    bits = (rng.uniform(0.5, 1.9, (N, K)) * 2.0 ** rng.integers(-7, 7, (N, K)) * rng.choice((-1, 1), (N, K))).astype(
        ml_dtypes.bfloat16
    )
    bits = bits.view(np.uint16)
    for first in range(0, N, 16):
        for k in range(0, K, dense.K_BLOCK):
            for place in rng.choice(16 * dense.K_BLOCK, num_odd, replace=False):
                n = first + place // dense.K_BLOCK
                if n < N:
                    bits[n, k + place % dense.K_BLOCK] = rng.choice((0, 0x8000, 3, 0x0100, 0x7F00, 0x8123, 0x2222))
    return bits.view(ml_dtypes.bfloat16)


def weight_of(data):
    return Weight("w", "bf16", data.shape, (StoredTensor("w", "bf16", data.shape, data),))


def unpacked(groups, headers):
    """What the layout means, without the code that reads or writes it."""
    groups, headers = groups.reshape(len(groups), -1, dense.GROUP.itemsize), headers.view(dense.HEADER)
    shape = *groups.shape[:2], 2, 4, 2, 8  # half, lane, which vector of two, byte
    shifts = np.array([0, 4], np.uint8).reshape(2, 1, 1, 1)
    codes = groups[..., 128:].reshape(*shape[:2], 1, *shape[3:]) >> shifts & 15
    tables = np.repeat(headers["table"], dense.GROUPS, axis=1)
    upper = np.take_along_axis(tables, codes.reshape(*shape[:2], -1).astype(np.int64), 2).reshape(shape)
    bits = upper.astype(np.uint16) << 8 | groups[..., :128].reshape(shape)
    bits = bits.transpose(0, 1, 2, 4, 3, 5).reshape(*shape[:2], 128)
    for p, i in np.ndindex(headers.shape):
        for place, group, value in headers[p, i]["patches"]:
            if group != dense.NO_GROUP:
                bits[p, i * dense.GROUPS + int(group), place] = value
    return bits.reshape(len(groups), -1, 16, 2)


@pytest.mark.parametrize("num_odd", [0, 1, dense.PATCHES])
def test_packed_weights_are_the_same_numbers(num_odd):
    weight = weight_of(values(48, 384, num_odd))
    groups, headers = pack_dense(BF16, weight)
    [panels] = pack(BF16, weight)
    assert (unpacked(groups, headers) == panels.view(np.uint16).reshape(len(panels), -1, 16, 2)).all()
    assert (groups.nbytes + headers.nbytes) / panels.nbytes == 49 / 64


@pytest.mark.parametrize("N, K, num_odd", [(32, 320, 0), (32, 256, 40)], ids=["its width", "its exponents"])
def test_a_matrix_for_which_it_does_not_pay_keeps_plain_panels(N, K, num_odd):
    weight = weight_of(values(N, K, num_odd))
    panels, headers = pack_dense(BF16, weight)
    assert headers.nbytes == 0 and (panels == pack(BF16, weight)[0]).all()


@pytest.mark.parametrize("table", [linear_cpu.CPU, linear_cpu.PER_TOKEN], ids=["all rows", "each row"])
@pytest.mark.parametrize(
    "K, num_odd", [(128, 0), (1280, dense.PATCHES), (1280, 60)], ids=["one block", "patches", "plain"]
)
def test_products_equal_the_definition(table, K, num_odd):
    N, rng = 80, np.random.default_rng(K)
    part = StoredTensor("w", "bf16", (N, K), values(N, K, num_odd))
    x, residual = rng.standard_normal((23, K), np.float32), rng.standard_normal((23, N), np.float32)
    expected = run(linear.REFERENCE, "bf16", x, [part], residual)
    for rows in range(1, 24):
        same_bits(run(table, "bf16", x[:rows], [part], residual[:rows], num_threads=1 + rows % 2), expected[:rows])
