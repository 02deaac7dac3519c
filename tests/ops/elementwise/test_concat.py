"""Two tensors side by side."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise import concat, concat_cpu
from lockstep.ops.elementwise.concat import Concat
from lockstep.runtime.program import Tensor
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("backend, threads", [(concat.REFERENCE, 1), (concat_cpu.CPU, 1), (concat_cpu.CPU, 3)])
def test_rows_side_by_side(backend, threads, num_tokens):
    x, y = (RNG.standard_normal((num_tokens, width)).astype(np.float32) for width in (48, 16))
    widths = dict(first_width=48, second_width=16)
    out = run_op(backend, Concat, num_threads=threads, first=x, second=y, **widths)["out"]
    same_bits(out, np.concatenate([x, y], axis=1))


def test_definition_interpreted():
    x, y = RNG.standard_normal((2, 3, 16)).astype(np.float32)
    out = np.empty((3, 32), np.float32)
    interpreted(concat.concat)(x, y, out)
    same_bits(out, np.concatenate([x, y], axis=1))


def test_a_width_that_is_no_whole_lines_is_refused():
    with pytest.raises(ValueError, match=r"expected second_width % 16 == 0, got second_width 8"):
        tensors = dict(out=Tensor("out", "T", 24), first=Tensor("x", "T", 16), second=Tensor("y", "T", 8))
        Concat(first_width=16, second_width=8, **tensors)
