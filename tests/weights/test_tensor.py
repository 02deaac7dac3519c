"""Tensors that are other views of what a file has: transposed, or rows in another order."""

import numpy as np
import pytest

from lockstep.formats import Q8_0
from lockstep.weights import safetensors
from lockstep.weights.tensor import GatheredTensor, StoredTensor, TransposedTensor
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
        matrix = TransposedTensor.of(whole, index)
        assert matrix.shape == matrix.data.shape == (7, 5) and matrix.format == "bf16"
        found = matrix.read(rows)
        assert found.flags.c_contiguous and (found == whole.data[index].T[rows]).all()
        assert (matrix.to_f32(rows) == whole.to_f32()[index].T[rows]).all()


def test_blocks_are_not_transposed():
    blocks = StoredTensor("w", "q8_0", (2, 4, 32), Q8_0.quantize(np.zeros((2, 4, 32), np.float32)))
    with pytest.raises(ValueError, match="tensor 'w': q8_0 blocks cannot be transposed"):
        TransposedTensor.of(blocks, 0)


@pytest.mark.parametrize("order", [[0], [4, 5, 6, 1, 2, 9], [3, 2, 1], [7, 7, 8], list(range(10))], ids=str)
def test_rows_in_another_order(order, tmp_path):
    whole = opened(tmp_path, RNG.standard_normal((10, 6)).astype(np.float32))
    gathered = GatheredTensor.of(whole, "some", np.array(order))
    assert (gathered.name, gathered.shape, gathered.data.nbytes) == ("some", (len(order), 6), 12 * len(order))
    for rows in (slice(None), slice(len(order) - 1, None), slice(0, 3)):
        assert (gathered.read(rows) == whole.data[order][rows]).all()


def test_rows_of_blocks_in_another_order():
    weights = RNG.standard_normal((6, 64)).astype(np.float32)
    whole = StoredTensor("w", "q8_0", (6, 64), Q8_0.quantize(weights))
    gathered = GatheredTensor.of(whole, "some", np.array([4, 5, 0]))
    assert (gathered.to_f32() == whole.to_f32()[[4, 5, 0]]).all() and gathered.shape == (3, 64)
    assert gathered.data.nbytes == whole.data.nbytes // 2


def test_a_file_that_became_shorter_is_named(tmp_path):
    stack = opened(tmp_path, RNG.standard_normal((2, 64, 64)).astype(np.float32))
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(4096)
    for tensor in (TransposedTensor.of(stack, 1), GatheredTensor.of(stack, "some", np.array([1, 0]))):
        with pytest.raises(ValueError, match=r"model\.safetensors: the file had \d+ bytes .* now has 4096"):
            tensor.read()
