"""A block-diagonal linear layer equals its definition and a plain layer for each group, for any number of rows."""

import numpy as np
import pytest

from lockstep.ops.linear import grouped_linear, linear_cpu
from lockstep.ops.linear.grouped_linear import GroupedLinear
from lockstep.ops.rewrite import lower
from lockstep.runtime.program import Program, Weight
from tests.kernels import ALL_FORMATS
from tests.ops.harness import Given, run_op, same_bits, weight
from tests.ops.linear.test_linear import INTEGER_FORMATS, RNG, narrow, prepared, run, stored

GROUPS, N = 3, 64
# by default one format for each kind of rows and of packing: tests/ops/linear/test_linear.py tests all tiles
FORMATS = (*INTEGER_FORMATS, "bf16", "f32") if ALL_FORMATS else ("q8_0", "q4_k", "bf16", "f32")


def run_grouped(table, format, x, parts, residual=None, num_threads=1):
    """parts: the weights of each group."""
    (features, K), groups = parts[0].shape, len(parts)
    sizes = dict(in_features=K, out_features=groups * features, groups=groups, width=groups * features)
    w, rows = Weight("w", format, (groups * features, K), tuple(parts)), dict(x=prepared(format, x))
    rows |= {} if residual is None else dict(residual=residual)
    operands = dict(weight=w, format=format, column=0, **rows, **sizes)
    return run_op(table, GroupedLinear, num_threads=num_threads, **operands)["out"]


def weights(format, groups=GROUPS, K=None):
    return [stored(format, N, K or narrow(format), f"group {g}") for g in range(groups)]


def values(rows, format):
    return RNG.standard_normal((rows, GROUPS * narrow(format))).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_kernel_equals_definition_and_a_layer_for_each_group(format):
    K, parts, x = narrow(format), weights(format), values(7, format)
    residual = RNG.standard_normal((7, GROUPS * N)).astype(np.float32)
    expected = run_grouped(grouped_linear.REFERENCE, format, x, parts, residual=residual, num_threads=2)
    same_bits(run_grouped(linear_cpu.CPU, format, x, parts, residual=residual, num_threads=3), expected)
    for g in range(GROUPS):
        columns = slice(g * N, (g + 1) * N)
        one = run(linear_cpu.CPU, format, x[:, g * K : (g + 1) * K], [parts[g]], residual[:, columns])
        same_bits(expected[:, columns].copy(), one)


@pytest.mark.parametrize("format", ["q8_0", "bf16"])
def test_all_widths_and_per_token_give_the_same_bits(format):
    parts, x = weights(format), values(49, format)
    per_token = run_grouped(linear_cpu.PER_TOKEN, format, x, parts, num_threads=2)
    for num_rows in (*range(1, 17), 49):
        same_bits(run_grouped(linear_cpu.CPU, format, x[:num_rows], parts, num_threads=2), per_token[:num_rows])


def test_wide_groups_are_worked_on_in_parts_of_k():
    """Where the panels of a tile exceed the first-level cache, the tile's sums pass through out."""
    parts, x = weights("q8_0", 2, 4096), RNG.standard_normal((20, 8192)).astype(np.float32)
    out = run_grouped(linear_cpu.CPU, "q8_0", x, parts, num_threads=2)
    same_bits(out, run_grouped(linear_cpu.PER_TOKEN, "q8_0", x, parts))


def recorded(program, **changed):
    x = program.emit(Given(out=program.tensor("x", "T", 3 * 64)))
    w = weight(np.zeros((192, 64), np.float32))
    sizes = dict(in_features=64, out_features=192, groups=3, width=192, column=0)
    return GroupedLinear(**dict(out=program.tensor("y", "T", 192), x=x, weight=w, **sizes) | changed)


def test_it_is_lowered_like_other_layers():
    program = Program()
    program.emit(recorded(program, weight=Weight("w", "q8_0", (192, 64), ())))
    _, prepare, multiply = lower(program).ops
    assert (prepare.kind, multiply.kind, multiply.x) == ("quantize_q8", "grouped_linear_q8_0", prepare.out)
    assert multiply.flops(0) == 2 * 192 * 64


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(groups=5), r"expected out_features % \(32 \* groups\) == 0, got out_features 192, groups 5"),
        (dict(groups=0), "got out_features 192, groups 0"),
        (dict(groups=2), r"x is .*, expected f32\[T, 128\]"),
        (dict(groups=2.0), "groups is 2.0, expected an integer"),
        (dict(width=176), "GroupedLinear: out"),
        (dict(column=16), "GroupedLinear: 192 features from column 16 on do not fit a row of 192"),
    ],
)
def test_what_cannot_be_multiplied_is_refused_while_recording(changed, message):
    with pytest.raises(ValueError, match=message):
        recorded(Program(), **changed)
