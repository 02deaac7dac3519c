"""Offsets of the fields of a structured dtype, for packing weights and for emitting code that reads them."""

from typing import Any

import numpy as np


def field(layout: np.dtype, path: str) -> tuple[np.dtype, int]:
    """A field's dtype and the byte at which it begins; path: names from the outside in, as "groups.codes"."""
    start = 0
    for name in path.split("."):
        fields: Any = layout.base.fields
        layout, begin = fields[name][:2]
        start += begin
    return layout, start


def offset(layout: np.dtype, path: str) -> int:
    """The byte at which a field begins."""
    return field(layout, path)[1]


def offsets(layout: np.dtype) -> tuple[int, ...]:
    """The bytes at which the fields begin, in order."""
    return tuple(offset(layout, name) for name in layout.names or ())


def part_bytes(layout: np.dtype, path: str) -> int:
    """Bytes from one part of a field to the next; its parts are counted by its first axis."""
    dtype, _ = field(layout, path)
    return dtype.itemsize // dtype.shape[0]


def view(array: np.ndarray, path: str) -> np.ndarray:
    """A field of every element of a structured array [...]: [..., *shape of the field]."""
    for name in path.split("."):
        array = array[name]
    return array
