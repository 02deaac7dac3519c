"""Weights and scales that are packed must be finite numbers."""

from typing import Protocol

import numpy as np


class Named(Protocol):
    """A tensor with the name that errors show."""

    @property
    def name(self) -> str: ...


def check_finite(tensor: Named, array: np.ndarray, first_row: int = 0, what: str = "weights") -> None:
    """ValueError if values are NaN or infinite; names the tensor, how many they are, and the index of the first.

    array: the values or the block scales (see `what`) of a part of the tensor, as floats, from row first_row on.
    """
    finite = np.isfinite(array)
    if finite.all():
        return
    first = tuple(int(i) for i in np.argwhere(~finite)[0])
    num_bad = array.size - int(np.count_nonzero(finite))
    index = [first[0] + first_row, *first[1:]] if first else []
    raise ValueError(
        f"tensor {tensor.name!r}: expected finite {what}, found {num_bad} NaN or infinite, "
        f"the first ({float(array[first])}) at index {index}"
    )
