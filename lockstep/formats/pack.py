"""Packing: a weight's stored rows in the layouts in which kernels and definitions read them.

The last panels are filled with zeros up to an even number of panels, so that a kernel may always take two.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from lockstep.formats.format import Format
from lockstep.formats.parts.finite import check_finite
from lockstep.formats.parts.layout import view
from lockstep.formats.parts.panels import PANEL, Arrange, Output, num_panels, padded_width
from lockstep.runtime.program import Weight

ROWS_AT_ONCE = 64 * PANEL  # packing works through a tensor in pieces of so many rows


class StoredRows(Protocol):
    """What packing asks of a tensor of a checkpoint; rows: of the first axis."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, rows: slice = ...) -> np.ndarray:
        """The rows as stored."""
        ...

    def finite_f32(self, rows: slice = ...) -> np.ndarray:
        """The rows' weights as float32; ValueError for one that is NaN or infinite."""
        ...


def _pieces(weight: Weight) -> Iterator[tuple[int, StoredRows, slice]]:
    """(first row, float32 or stored blocks) of a weight, piece by piece: (row, part, slice)."""
    row = 0
    for part in weight.parts:
        count = part.shape[0]
        for start in range(0, count, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, count))
            yield row + start, part, rows
        row += count


def fields(format: Format, part: StoredRows, rows: slice) -> tuple[np.ndarray, ...]:
    """What `Stored.unpack` returns for rows of a tensor, as stored or encoded now; values or scales are finite.

    Raises ValueError for a tensor in another format than one to which nothing is encoded.
    """
    if format.is_quantized and part.format == format.name:
        found = format.split(part.read(rows))
        _check_scales(found, part, rows)
        return found
    if format.stored.encode is None:
        raise ValueError(
            f"tensor {part.name!r} is stored as {part.format}: a {format.name} linear layer takes only that"
        )
    values = part.finite_f32(rows)
    if not format.is_quantized:
        return (format.stored.encode(values),)
    try:
        found = format.split(format.quantize(values))
    except ValueError as error:
        raise ValueError(f"tensor {part.name!r}: {error}") from None
    _check_scales(found, part, rows)
    return found


def _check_scales(found: tuple[np.ndarray, ...], part: StoredRows, rows: slice) -> None:
    for field in found:
        if field.dtype == np.float16:
            check_finite(part, field, rows.start or 0, "block scales")


def pack(format: Format, weight: Weight) -> tuple[np.ndarray, ...]:
    """The panels of a weight, and the stream of scales if the format has one: uint8 [panels, bytes] each."""
    count, K = num_panels(weight.shape[0]), weight.shape[1]
    arrays, places = [], {}
    for layout, size in ((format.packed.panel, format.packed.size), (format.packed.scales, format.stored.size)):
        if layout is not None:
            arrays.append(np.zeros((count, K // size), layout))
            places |= {name: arrays[-1] for name in layout.names or ()}
    for row, part, rows in _pieces(weight):
        for path, (arrange, values) in format.packed.arrange(*fields(format, part, rows)).items():
            array = view(places[path.split(".")[0]], path)
            _place(array, _shaped(arrange, array.shape[1:]), values, row)
    return tuple(array.view(np.uint8) for array in arrays)


def _shaped(arrange: Arrange, shape: tuple[int, ...]) -> Arrange:
    """An arrangement, as an array of panels of a shape."""
    return lambda values: arrange(values).reshape(len(values), *shape)


def defined(format: Format, weight: Weight) -> tuple[np.ndarray, ...]:
    """A weight as definitions read it: the fields of all rows, piece after piece, and of zeros up to whole panels.

    Codes are int8, without what they count too much; other fields are float32, if they are not int8.
    """
    pieces = [fields(format, part, slice(None)) for part in weight.parts]
    codes, *rest = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    codes = codes.astype(np.int8) - np.int8(format.zero) if format.is_quantized else codes.astype(np.float32)
    rest = [a if a.dtype == np.int8 else a.astype(np.float32) for a in rest]
    return tuple(np.pad(a, ((0, padded_width(len(a)) - len(a)), (0, 0))) for a in (codes, *rest))


def scatter(
    weight: Weight, outputs: Iterable[Output], convert: Callable[[StoredRows, slice], Iterable[np.ndarray]]
) -> None:
    """Fills row-major staging of ROWS_AT_ONCE rows and writes it to the outputs' panels.

    convert(part, rows) -> arrays [rows, ...]; outputs: (array [panels, ...], function from [panels, 16, ...] to it).
    """
    for row, part, rows in _pieces(weight):
        for (array, arrange), values in zip(outputs, convert(part, rows), strict=True):
            _place(array, arrange, values, row)


def _place(array: np.ndarray, arrange: Arrange, values: np.ndarray, row: int) -> None:
    """Writes rows (starting anywhere) into panels; rows of a panel that is only partly covered keep the others."""
    first, last = row // PANEL, -(-(row + len(values)) // PANEL)
    if row % PANEL == 0 and len(values) % PANEL == 0:
        array[first:last] = arrange(values.reshape(last - first, PANEL, *values.shape[1:]))
        return
    staged = np.zeros(((last - first) * PANEL, *values.shape[1:]), values.dtype)
    mask = np.zeros(staged.shape, bool)
    staged[row - first * PANEL :][: len(values)] = values
    mask[row - first * PANEL :][: len(values)] = True
    shape = (last - first, PANEL, *values.shape[1:])
    np.copyto(array[first:last], arrange(staged.reshape(shape)), where=arrange(mask.reshape(shape)).astype(bool))
