"""Step blocks: made, written and measured by the names of their fields."""

import numpy as np
import pytest

from lockstep.runtime.step_block import STEP_WORDS, StepBlock
from tests.ops.harness import ragged_step


def test_shapes_are_numbers_for_each_letter():
    shapes = StepBlock.shapes(T=7, S=2, R=3, E=1, O=4, P=5, W=3)
    assert (shapes["token_ids"], shapes["query_start"], shapes["page_table"]) == ((7,), (3,), (6, 5))
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
def test_an_unknown_field_is_named_in_the_error(name):
    with pytest.raises(ValueError, match=f"StepBlock: there is no field '{name}'; it has num_tokens, num_requests"):
        StepBlock.made(**{name: 1})


def test_arrays_of_a_test_step_have_the_declared_shapes():
    step, held = ragged_step([3, 1], [3, 9], embedded_row=[2])
    assert held["position"].tolist() == [0, 1, 2, 8] and step[StepBlock.index("num_embedded")] == 1
    with pytest.raises(AssertionError, match="state_slot"):
        ragged_step([3, 1], state_slot=[0])


@pytest.mark.parametrize(
    "field, message",
    [
        (dict(num_tokens=-5), "num_tokens is -5, expected an integer from 0"),
        (dict(num_tokens=1.7), "num_tokens is 1.7, expected an integer"),
        (dict(num_tokens="3"), "num_tokens is '3', expected an integer"),
        (dict(num_tokens=True), "num_tokens is True, expected an integer"),
        (dict(num_tokens=2**70), "num_tokens is 1180591620717411303424, expected an integer from 0 to 2"),
        (dict(num_tokens=np.array([1])), r"num_tokens is array\(\[1\]\), expected an integer"),
        (dict(token_ids=7), "token_ids is 7, expected a contiguous array of rank 1"),
        (dict(token_ids=[1, 2]), r"token_ids is \[1, 2\], expected a contiguous array"),
        (dict(token_ids=np.arange(3)), "token_ids is int64, expected int32"),
        (dict(token_ids=np.arange(6, dtype=np.int32)[::2]), "token_ids is shape .3,., expected a contiguous array"),
        (dict(page_table=np.zeros(4, np.int32)), "page_table is shape .4,., expected a contiguous array of rank 2"),
        (dict(sampling=np.zeros(4, np.int32)), "sampling is int32, expected records"),
    ],
)
def test_a_value_that_a_field_cannot_hold_is_refused(field, message):
    with pytest.raises(ValueError, match=f"StepBlock: {message}"):
        StepBlock.made(**field)


def test_a_count_that_shapes_need_is_named():
    with pytest.raises(ValueError, match=r"S \+ 1: S is not given"):
        StepBlock.shapes(T=3)
