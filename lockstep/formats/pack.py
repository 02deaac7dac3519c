"""Packing: a weight's stored rows become the arrays that kernels and definitions read.

The last panels are filled with zeros up to an even number of panels, so that a kernel may always take two.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from lockstep.formats.format import Format
from lockstep.formats.parts.finite import check_finite
from lockstep.formats.parts.layout import view
from lockstep.formats.parts.panels import PANEL, Arrange, Destination, num_panels, padded_width
from lockstep.runtime.executor import aligned
from lockstep.runtime.program import Weight

ROWS_AT_ONCE = 64 * PANEL  # rows of a piece: a tensor is packed piece by piece


class StoredRows(Protocol):
    """A tensor of a checkpoint, as far as packing needs it; rows: a slice of the first axis."""

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


def _pieces(weight: Weight, chosen: range | None = None) -> Iterator[tuple[int, StoredRows, slice]]:
    """(number, among the chosen ones, of the row at which a piece begins; stored tensor, slice of the tensor's rows) of
    every piece. chosen: neighbouring rows of the weight; None: all."""
    row, first, last = 0, 0, weight.shape[0]
    if chosen is not None:
        first, last = chosen.start, chosen.stop
    for part in weight.parts:
        end = min(part.shape[0], last - row)
        for start in range(max(0, first - row), end, ROWS_AT_ONCE):
            yield row + start - first, part, slice(start, min(start + ROWS_AT_ONCE, end))
        row += part.shape[0]


def fields(format: Format, part: StoredRows, rows: slice) -> tuple[np.ndarray, ...]:
    """What `Stored.unpack` returns for rows of a tensor, which are encoded unless they are stored in the format.

    ValueError for values or scales that are not finite, and for a tensor in another format if there is no `encode`.
    """
    if format.is_quantized and part.format == format.name:
        unpacked = format.split(part.read(rows))
        _check_scales(unpacked, part, rows)
        return unpacked
    if format.stored.encode is None:
        raise ValueError(
            f"tensor {part.name!r} is stored as {part.format}: a {format.name} linear layer takes only {format.name}"
        )
    values = part.finite_f32(rows)
    if not format.is_quantized:
        return (format.stored.encode(values),)
    try:
        unpacked = format.split(format.quantize(values))
    except ValueError as error:
        raise ValueError(f"tensor {part.name!r}: {error}") from None
    _check_scales(unpacked, part, rows)
    return unpacked


def _check_scales(unpacked: tuple[np.ndarray, ...], part: StoredRows, rows: slice) -> None:
    for field in unpacked:
        if field.dtype.kind == "f":
            check_finite(part, field, rows.start or 0, "block scales")


def pack(format: Format, weight: Weight, chosen: range | None = None) -> tuple[np.ndarray, ...]:
    """The panels of a weight, and the stream of scales if the format has one: uint8 [panels, bytes] each, on a cache
    line. chosen: neighbouring rows of the weight that make whole panels; None: all."""
    num, K = num_panels(weight.shape[0] if chosen is None else len(chosen)), weight.shape[1]
    arrays, places, packed = [], {}, format.packed
    for layout, size in ((packed.panel, packed.size), (packed.scales, K if packed.per_row else format.stored.size)):
        if layout is not None:
            arrays.append(aligned(num * (K // size) * layout.itemsize).view(layout).reshape(num, K // size))
            places |= {name: arrays[-1] for name in layout.names or ()}
    for row, part, rows in _pieces(weight, chosen):
        for path, (arrange, values) in packed.arrange(*fields(format, part, rows)).items():
            array = view(places[path.split(".")[0]], path)
            _place(array, _shaped(arrange, array.shape[1:]), values, row)
    return tuple(array.view(np.uint8) for array in arrays)


def pack_dense(format: Format, weight: Weight) -> tuple[np.ndarray, ...]:
    """The same in the format's dense layout: groups and headers; plain panels and no bytes where that does not pay."""
    [panels] = pack(format, weight)
    assert format.dense is not None, format.name
    made = format.dense.packed(view(panels.view(format.packed.panel), "codes"))
    return made or (panels, np.zeros((len(panels), 0), np.uint8))


def _shaped(arrange: Arrange, shape: tuple[int, ...]) -> Arrange:
    """An arrangement whose panels have the shape of their field."""
    return lambda values: arrange(values).reshape(len(values), *shape)


def defined(format: Format, weight: Weight) -> tuple[np.ndarray, ...]:
    """A weight as definitions read it: the fields of all rows, and zeros up to whole panels.

    Codes are int8, less the format's zero point or looked up in its table; other fields are float32, unless they are
    int8.
    """
    pieces = [fields(format, part, slice(None)) for part in weight.parts]
    codes, *rest = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    if format.table is not None:
        codes = format.table[codes]
    else:
        codes = codes.astype(np.int8) - np.int8(format.zero) if format.is_quantized else codes.astype(np.float32)
    rest = [a if a.dtype == np.int8 else a.astype(np.float32) for a in rest]
    return tuple(np.pad(a, ((0, padded_width(len(a)) - len(a)), (0, 0))) for a in (codes, *rest))


def scatter(
    weight: Weight, destinations: Iterable[Destination], convert: Callable[[StoredRows, slice], Iterable[np.ndarray]]
) -> None:
    """Converts the rows of a weight piece by piece, and writes them to the panels of arrays.

    convert(part, rows): an array [rows, ...] for each of the destinations.
    """
    for row, part, rows in _pieces(weight):
        for (array, arrange), values in zip(destinations, convert(part, rows), strict=True):
            _place(array, arrange, values, row)


def _place(array: np.ndarray, arrange: Arrange, values: np.ndarray, row: int) -> None:
    """Writes rows (starting anywhere) into panels; other rows of the first and the last panel keep their values, also
    where a byte holds codes of several."""
    first, last = row // PANEL, -(-(row + len(values)) // PANEL)
    if row % PANEL == 0 and len(values) % PANEL == 0:
        array[first:last] = arrange(values.reshape(last - first, PANEL, *values.shape[1:]))
        return
    staged = np.zeros(((last - first) * PANEL, *values.shape[1:]), values.dtype)
    mask = np.zeros(staged.shape, bool)
    staged[row - first * PANEL :][: len(values)] = values
    mask[row - first * PANEL :][: len(values)] = True
    shape = (last - first, PANEL, *values.shape[1:])
    arranged, panels = arrange(staged.reshape(shape)), array[first:last]
    if array.dtype != np.uint8:
        np.copyto(panels, arranged, where=arrange(mask.reshape(shape)))
        return
    lowest = arrange(np.ones(shape, np.uint8))  # the lowest bit of every code
    bits = arrange(mask.reshape(shape).view(np.uint8)) * (255 // lowest)
    panels[:] = panels & ~bits | arranged
