"""Rounding to grids: kernels equal the definition, which follows published formulas."""

import ml_dtypes
import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops import BACKENDS
from lockstep.ops.elementwise.activations import quantize_block
from lockstep.ops.rounded import fake_quant, fake_quant_cpu, grids
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.runtime.executor import Executor, aligned
from lockstep.runtime.program import Program, Setting
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from tests.ops.harness import ragged_step, run_op, same_bits
from tests.ops.rounded.grid_cases import GRIDS, floats, integer, row

RNG = np.random.default_rng(3)
ODD = np.array([0.0, -0.0, 1e-30, -1e-38, 1e-45, 3e38, -3e38, 0.5, 1.5, 2.5, -2.5, 448.0, 6.0, 7.0], np.float32)


def numbers(num_rows, width):
    """Rows of numbers of several magnitudes, zeros, denormals and ties among them."""
    x = (RNG.standard_normal((num_rows, width)) * np.exp2(RNG.integers(-6, 5, (num_rows, 1)))).astype(np.float32)
    at = RNG.integers(0, x.size, x.size // 5)
    x.ravel()[at] = RNG.choice(ODD, at.size)
    x[-1, : width // 2] = 0
    return x


def run(table, x, grid_rows, num_threads=1, step=None, **changes):
    heads = len(grid_rows)
    sizes = dict(width=x.shape[1], column=0, stride=x.shape[1], head_width=x.shape[1], num_heads=heads) | changes
    made = dict(out=(x.shape[1], "f32"), x=x, grids=np.stack(grid_rows), **sizes)
    return run_op(table, FakeQuant, step=step, num_threads=num_threads, **made)["out"]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("width", [1, 15, 16, 33, 256])
def test_kernels_equal_definition(name, width):
    x = numbers(7, width)
    expected = run(fake_quant.REFERENCE, x, [GRIDS[name]])
    same_bits(run(fake_quant_cpu.CPU, x, [GRIDS[name]], num_threads=3), expected)
    same_bits(run(fake_quant_cpu.PER_TOKEN, x, [GRIDS[name]], num_threads=2), expected)
    by_hand = x.copy()
    with np.errstate(all="ignore"):
        for each in by_hand:
            interpreted(grids.quantize_row)(each, GRIDS[name])
    same_bits(by_hand, expected)


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_not_finite_is_not_hidden(name):
    for value in (np.nan, np.inf):
        x = numbers(2, 48)
        x[1] = np.clip(x[1], -1e3, 1e3)
        x[0, 37] = value
        expected, fast = (run(table, x, [GRIDS[name]]) for table in (fake_quant.REFERENCE, fake_quant_cpu.CPU))
        np.testing.assert_array_equal(expected, fast)
        if np.isnan(value):
            assert np.isnan(fast[0, 37])
        elif name.startswith(("mx", "nv", "q8")) or "/" in name:
            assert np.isnan(fast[0, 37])
        assert np.isfinite(fast[1]).all()


def test_integers_are_rounded_by_the_published_formula():
    x = np.clip(numbers(5, 64), -1e6, 1e6)
    out = run(fake_quant_cpu.CPU, x, [integer(0.1, 3, -8, 7)])
    scale = np.float32(0.1)
    codes = np.clip(np.rint(x * (np.float32(1) / scale)) + np.float32(3), -8, 7).astype(np.float32)
    same_bits(out, (codes - np.float32(3)) * scale)


@pytest.mark.parametrize(
    "name, dtype",
    [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2), ("e2m1", ml_dtypes.float4_e2m1fn)],
)
def test_small_floats_are_those_of_ml_dtypes(name, dtype):
    largest = grids.SMALL_FLOATS[name][3]
    x = np.clip(numbers(9, 256), -largest, largest)
    out = run(fake_quant_cpu.CPU, x, [floats(grids.FLOAT, name)])
    np.testing.assert_array_equal(out, x.astype(dtype).astype(np.float32))


def test_microscaled_blocks_have_the_published_scales():
    x = numbers(1, 64)
    x[0, :32] = np.linspace(-1, 1, 32)
    x[0, 5] = 5.0  # exponent 2: less e2m1's largest exponent 2, a scale of 1
    out = run(fake_quant_cpu.CPU, x, [GRIDS["mxfp4"]])
    expected = np.clip(x[0, :32], -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(out[0, :32], expected)


def test_q8_blocks_are_those_of_linear_layers():
    x = RNG.standard_normal(32).astype(np.float32)
    codes = np.empty(32, np.int8)
    scale = quantize_block(x, codes)[0]
    same_bits(run(fake_quant_cpu.CPU, x[None], [GRIDS["q8"]])[0], codes.astype(np.float32) * np.float32(scale))


@pytest.mark.parametrize("table", [fake_quant.REFERENCE, fake_quant_cpu.CPU], ids=["reference", "cpu"])
def test_keys_that_a_row_does_not_see_are_left_alone(table):
    x, step = numbers(3, 96), ragged_step([3], [34])
    out = run(table, x, [GRIDS["i8/row"]], step=step[0], seen_only=True)
    for t, seen in enumerate((32, 33, 34)):
        same_bits(out[t, seen:], x[t, seen:])
        alone = run(table, np.ascontiguousarray(x[t : t + 1, :seen]), [GRIDS["i8/row"]])
        same_bits(out[t, :seen], alone[0])


def test_heads_have_grids_of_their_own_and_other_columns_stay():
    program = Program()
    x = program.give("x", "T", 80)
    made = dict(column=16, stride=32, head_width=16, num_heads=2, width=80)
    with pytest.raises(ValueError, match="FakeQuant: y is another tensor than x"):
        FakeQuant(out=program.tensor("y", "T", 80), x=x, grids=Setting("g", np.zeros((2, 8), np.float32)), **made)
    op = FakeQuant(out=x, x=x, grids=Setting("g", np.stack([GRIDS["u4"], GRIDS["e4m3"]])), **made)
    values, after = numbers(4, 80), {}
    for name in ("reference", "cpu"):
        after[name] = in_place(program, op, BACKENDS[name], values)
    same_bits(after["cpu"], after["reference"])
    expected = values.copy()
    for head, name in enumerate(("u4", "e4m3")):
        at = slice(16 + 32 * head, 32 + 32 * head)
        expected[:, at] = run(fake_quant.REFERENCE, np.ascontiguousarray(values[:, at]), [GRIDS[name]])
    same_bits(after["cpu"], expected)


def in_place(program, op, backend, values):
    """The rows after a program of one op, which works on them in place."""
    memory = aligned(4 * values.size + 64)[: 4 * values.size].view(np.float32).reshape(values.shape)
    memory[...] = values
    team = Team(1)
    try:
        made = program.rewritten([op])
        rows = dict(T=len(values), O=1, R=1, E=1, S=1)
        executor = Executor(made, backend, team, WeightStore(), rows, {}, elsewhere={op.x: memory.ctypes.data})
        executor.run(ragged_step([len(values)])[0])
        return memory.copy()
    finally:
        team.close()


def test_a_grid_is_one_row_a_head():
    with pytest.raises(ValueError, match=r"FakeQuant: grids \(grids\) is 2 x 8 wide, expected 1 x 8"):
        run(fake_quant_cpu.CPU, numbers(1, 16), [row(0), row(0)], num_heads=1)


@pytest.mark.parametrize("table", [fake_quant.REFERENCE, fake_quant_cpu.CPU], ids=["reference", "cpu"])
def test_with_an_added_mask_a_row_has_all_keys_of_its_sequence(table):
    x, step = numbers(3, 96), ragged_step([2, 1], [34, 70])
    out = run(table, x, [GRIDS["i8/row"]], step=step[0], seen_only=True, additive=True)
    for t, num_keys in enumerate((34, 34, 70)):
        same_bits(out[t, num_keys:], x[t, num_keys:])
        alone = run(table, np.ascontiguousarray(x[t : t + 1, :num_keys]), [GRIDS["i8/row"]])
        same_bits(out[t, :num_keys], alone[0])
    with pytest.raises(ValueError, match="expected seen_only >= additive, got seen_only False, additive True"):
        run(table, x, [GRIDS["off"]], additive=True)
