"""Step blocks: made, written and measured by the names of their fields."""

import numpy as np
import pytest

from lockstep.runtime.step_block import STEP_WORDS, StepBlock
from tests.ops.harness import ragged_step


def test_shapes_are_numbers_for_each_letter():
    shapes = StepBlock.shapes(T=7, S=2, R=3, E=1, O=4, P=5)
    assert (shapes["token_ids"], shapes["query_start"], shapes["page_table"]) == ((7,), (3,), (2, 5))
    assert (shapes["sampled_row"], shapes["embedded_row"], shapes["output_row"]) == ((3,), (1,), (4,))
    assert set(shapes) | {"num_tokens", "num_requests"} < {word.name for word in StepBlock.words()}


def test_fields_are_written_by_name():
    ids = np.arange(3, dtype=np.int32)
    block = StepBlock.made(num_tokens=3, token_ids=ids)
    StepBlock.write(block, num_requests=2)
    expected = dict(num_tokens=3, num_requests=2, token_ids=ids.ctypes.data)
    assert block.shape == (STEP_WORDS,) and block.dtype == np.int64
    assert {name: int(block[StepBlock.index(name)]) for name in expected} == expected
    assert np.count_nonzero(block) == len(expected)


@pytest.mark.parametrize("name", ["num_token", "TOKEN_IDS"])
def test_a_field_that_there_is_not_is_named(name):
    with pytest.raises(ValueError, match=f"StepBlock: there is no field '{name}'; it has num_tokens, num_requests"):
        StepBlock.made(**{name: 1})


def test_arrays_of_a_test_step_have_the_declared_shapes():
    step, held = ragged_step([3, 1], [3, 9], embedded_row=[2])
    assert held["position"].tolist() == [0, 1, 2, 8] and step[StepBlock.index("num_embedded")] == 1
    with pytest.raises(AssertionError, match="state_slot"):
        ragged_step([3, 1], state_slot=[0])
