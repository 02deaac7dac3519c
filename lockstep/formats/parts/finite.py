"""Weights and scales that are packed must be finite numbers."""

from typing import Protocol

import numpy as np


class Named(Protocol):
    """A tensor, as errors name it."""

    @property
    def name(self) -> str: ...


def check_finite(tensor: Named, array: np.ndarray, first_row: int = 0, what: str = "weights") -> None:
    """Raise ValueError naming the tensor, how many values are NaN or infinite, and the first one's index.

    `array` is whatever part of the tensor is being packed, as floats: its values or its block scales (`what`), from row
    `first_row` on.
    """
    finite = np.isfinite(array)
    if finite.all():
        return
    first = tuple(int(i) for i in np.argwhere(~finite)[0])
    count = array.size - int(np.count_nonzero(finite))
    index = [first[0] + first_row, *first[1:]] if first else []
    raise ValueError(
        f"tensor {tensor.name!r}: expected finite {what}, found {count} NaN or infinite, "
        f"the first ({float(array[first])}) at index {index}"
    )
