"""Tensors that are parts of others in another order: transposed, or rows one after the other."""

import numpy as np
import pytest

from lockstep.formats import Q8_0
from lockstep.weights import safetensors
from lockstep.weights.rearranged import flattened, gathered, transposed
from lockstep.weights.tensor import MadeTensor, StoredTensor
from tests.models.tiny import write

RNG = np.random.default_rng(3)


def opened(folder, array, dtype="BF16"):
    """A tensor in a mapped file."""
    write(folder, {}, {"w": array}, dtype)
    return safetensors.open_file(folder / "model.safetensors").load("w")


@pytest.mark.parametrize("rows", [slice(None), slice(1, 4), slice(6, 7)])
def test_rows_of_a_transposed_matrix(rows, tmp_path):
    stack = RNG.standard_normal((3, 5, 7)).astype(np.float32)
    whole = opened(tmp_path, stack)
    for index in range(3):
        matrix = transposed(whole, index)
        assert matrix.shape == matrix.data.shape == (7, 5) and matrix.format == "bf16"
        found = matrix.read(rows)
        assert found.flags.c_contiguous and (found == whole.data[index].T[rows]).all()
        assert (matrix.to_f32(rows) == whole.to_f32()[index].T[rows]).all()


def test_blocks_are_not_transposed():
    blocks = StoredTensor("w", "q8_0", (2, 4, 32), Q8_0.quantize(np.zeros((2, 4, 32), np.float32)))
    with pytest.raises(ValueError, match="tensor 'w': q8_0 blocks cannot be transposed"):
        transposed(blocks, 0)


@pytest.mark.parametrize("order", [[0], [4, 5, 6, 1, 2, 9], [3, 2, 1], [7, 7, 8], list(range(10))], ids=str)
def test_rows_in_another_order(order, tmp_path):
    whole = opened(tmp_path, RNG.standard_normal((10, 6)).astype(np.float32))
    some = gathered(whole, "some", np.array(order))
    assert (some.name, some.shape, some.data.nbytes) == ("some", (len(order), 6), 12 * len(order))
    for rows in (slice(None), slice(len(order) - 1, None), slice(0, 3)):
        assert (some.read(rows) == whole.data[order][rows]).all()


def test_rows_of_blocks_in_another_order():
    weights = RNG.standard_normal((6, 64)).astype(np.float32)
    whole = StoredTensor("w", "q8_0", (6, 64), Q8_0.quantize(weights))
    some = gathered(whole, "some", np.array([4, 5, 0]))
    assert (some.to_f32() == whole.to_f32()[[4, 5, 0]]).all() and some.shape == (3, 64)
    assert some.data.nbytes == whole.data.nbytes // 2


def test_a_stack_is_one_matrix(tmp_path):
    stack = opened(tmp_path, RNG.standard_normal((3, 4, 6)).astype(np.float32))
    made = MadeTensor.of("w", "bf16", (3, 4, 6), stack.read)
    for one in (flattened(stack), flattened(made)):
        assert one.shape == (12, 6) and one.data.nbytes == stack.data.nbytes
        for rows in (slice(None), slice(0, 4), slice(3, 9), slice(5, 6), slice(10, 12)):
            assert (one.read(rows) == stack.data.reshape(12, 6)[rows]).all()
    blocks = StoredTensor("w", "q8_0", (2, 3, 64), Q8_0.quantize(RNG.standard_normal((2, 3, 64)).astype(np.float32)))
    assert (flattened(blocks).to_f32() == blocks.to_f32().reshape(6, 64)).all()


def test_a_file_that_became_shorter_is_named(tmp_path):
    stack = opened(tmp_path, RNG.standard_normal((2, 64, 64)).astype(np.float32))
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(4096)
    for tensor in (transposed(stack, 1), gathered(stack, "some", np.array([1, 0]))):
        with pytest.raises(ValueError, match=r"model\.safetensors: the file had \d+ bytes .* now has 4096"):
            tensor.read()
