"""Codes that are unpacked once for all tiles of many rows: the bits of each row alone, for every number of rows."""

import numpy as np
import pytest

from lockstep.formats import FORMATS
from lockstep.native import targets
from lockstep.ops.linear import linear_cpu
from lockstep.ops.linear.experts import ExpertLinear, ExpertRows
from lockstep.ops.sampling import score_cpu
from lockstep.runtime.program import Weight
from tests.ops.harness import same_bits
from tests.ops.linear.test_experts import E, N, X, both, experts_of, prepared, routed
from tests.ops.linear.test_linear import RNG, run, stored

UNPACKED = [name for name, format in FORMATS.items() if format.unpacked_on(targets.TARGET)]
EVERYWHERE = [(target, name) for target in targets.TARGETS for name in FORMATS if FORMATS[name].unpacked_on(target)]


def heights(num_rows, shapes):
    """Of the tiles that num_rows rows are cut into: the first, which unpacks, and the others."""
    few, _, most, panels = shapes
    if num_rows <= 2 * (most if panels == 1 else few):
        return None, []
    first, others = linear_cpu.tile_rows.py_func(num_rows, most), []
    left = num_rows - first
    while left:
        others.append(linear_cpu.tile_rows.py_func(left, most))
        left -= others[-1]
    return first, others


@pytest.mark.parametrize("target, name", EVERYWHERE, ids=lambda each: getattr(each, "name", each))
def test_tiles_of_every_height_that_occurs_are_compiled(target, name):
    """A height that is not would compute nothing."""
    for shapes in (linear_cpu.shapes_of(FORMATS[name], target), score_cpu.SHAPES):
        _, fewest, most, _ = shapes
        for num_rows in range(1, 500):
            first, others = heights(num_rows, shapes)
            assert first is None or fewest + 1 <= first <= most
            assert all(fewest <= other <= most for other in others)


@pytest.mark.parametrize("name", UNPACKED)
def test_every_number_of_rows_gives_the_bits_of_each_row_alone(name):
    """At a width that is worked on in two parts."""
    K, most = 2048, 45
    parts, x = [stored(name, 53, K)], RNG.standard_normal((most, K)).astype(np.float32)
    residual = RNG.standard_normal((most, 64)).astype(np.float32)
    alone = run(linear_cpu.PER_TOKEN, name, x, parts, residual, num_threads=2)
    for num_rows in range(7, most + 1):
        together = run(linear_cpu.CPU, name, x[:num_rows], parts, residual[:num_rows], num_threads=2)
        same_bits(together, alone[:num_rows])


def test_experts_of_wide_rows_are_worked_on_in_parts():
    T, width = 60, 4096
    random, (order, start) = np.random.RandomState(0), routed(T, 5)
    weights = Weight("experts", "q4_k", (E * N, width), experts_of(random, "q4_k", width))
    x = both(
        ExpertRows, T, x=random.standard_normal((T, width)).astype(np.float32), order=order, **prepared("q4_k", width)
    )
    shape = dict(width=width, features=N, num_experts=E, top_k=X)
    assert np.diff(start[0]).max() > 2 * linear_cpu.shapes_of(FORMATS["q4_k"])[0]
    both(ExpertLinear, T, x=x, expert_start=start, weight=weights, **shape)
