"""Weights in the layouts that kernels read: panels of sixteen output features, K in the order of the reduction.

    f32, f16   [panel][k][16]                          bf16   [panel][k / 2][16][2]
    q8_0       codes  [panel][k / 4][16][4]  8 bit     scales [panel][k / 32][16] float16
    q4_0       codes  [panel][k / 8][16][4]  low nibbles k..k+3, high nibbles k+4..k+7; scales as q8_0

The last panels are filled with zeros up to an even number of panels, so that a kernel may always take two.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Protocol

import ml_dtypes
import numpy as np

from lockstep.formats import BLOCK_FORMATS, q4_0, q8_0
from lockstep.formats.finite import check_finite
from lockstep.formats.panels import PANEL, Arrange, Output, grouped, k_major, nibble_pairs, num_panels
from lockstep.runtime.program import Weight
from lockstep.runtime.targets import unsigned_weights

ROWS_AT_ONCE = 64 * PANEL  # packing works through a tensor in pieces of so many rows


class Stored(Protocol):
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


def _pieces(weight: Weight) -> Iterator[tuple[int, Stored, slice]]:
    """(first row, float32 or stored blocks) of a weight, piece by piece: (row, part, slice)."""
    row = 0
    for part in weight.parts:
        count = part.shape[0]
        for start in range(0, count, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, count))
            yield row + start, part, rows
        row += count


def floats(part: Stored, rows: slice) -> np.ndarray:
    """Rows of a tensor as float32."""
    return part.finite_f32(rows)


def block_fields(part: Stored, rows: slice, format: str) -> tuple[np.ndarray, ...]:
    """What the `split` of a block format returns for rows of a tensor, as stored or quantized now; scales are checked.

    Raises ValueError for a tensor in another format than one to which nothing is quantized.
    """
    block = BLOCK_FORMATS[format]
    if part.format == format:
        packed = part.read(rows)
    elif block in (q8_0, q4_0):
        packed = _quantized(part, rows, block)
    else:
        raise ValueError(f"tensor {part.name!r} is stored as {part.format}: a {format} linear layer takes only that")
    fields = block.split(packed)
    for field in fields:
        if field.dtype == np.float16:
            check_finite(part, field, rows.start or 0, "block scales")
    return fields


def _quantized(part: Stored, rows: slice, block: ModuleType) -> np.ndarray:
    values = floats(part, rows)
    try:
        return block.quantize(values)
    except ValueError as error:
        raise ValueError(f"tensor {part.name!r}: {error}") from None


q8_0_fields = partial(block_fields, format="q8_0")
q4_0_fields = partial(block_fields, format="q4_0")


def scatter(
    weight: Weight, outputs: Iterable[Output], convert: Callable[[Stored, slice], Iterable[np.ndarray]]
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


def pack_f32(weight: Weight) -> tuple[np.ndarray, ...]:
    """float32 panels."""
    panels = np.zeros((num_panels(weight.shape[0]), weight.shape[1], PANEL), np.float32)
    scatter(weight, [(panels, k_major)], lambda part, rows: [floats(part, rows)])
    return (panels,)


def pack_f16(weight: Weight) -> tuple[np.ndarray, ...]:
    """float16 panels, for weights stored as float16."""
    panels = np.zeros((num_panels(weight.shape[0]), weight.shape[1], PANEL), np.float16)
    scatter(weight, [(panels, k_major)], lambda part, rows: [floats(part, rows).astype(np.float16)])
    return (panels,)


def pack_bf16(weight: Weight) -> tuple[np.ndarray, ...]:
    """bf16 pairs of panels, as uint16."""
    panels = np.zeros((num_panels(weight.shape[0]), weight.shape[1] // 2, PANEL, 2), np.uint16)
    convert = lambda part, rows: [floats(part, rows).astype(ml_dtypes.bfloat16).view(np.uint16)]
    scatter(weight, [(panels, grouped(2))], convert)
    return (panels,)


def pack_q8_0(weight: Weight) -> tuple[np.ndarray, ...]:
    """Codes (plus 128 where the target's dot takes unsigned weights) and scales."""
    rows, width = num_panels(weight.shape[0]), weight.shape[1]
    zero = 128 if unsigned_weights() else 0
    codes = np.full((rows, width // 4, PANEL, 4), zero, np.uint8)
    scales = np.zeros((rows, width // 32, PANEL), np.float16)

    def convert(part, rows):
        values, scale = q8_0_fields(part, rows)
        return (values.view(np.uint8) + np.uint8(zero)), scale

    scatter(weight, [(codes, grouped(4)), (scales, k_major)], convert)
    return codes, scales


def pack_q4_0(weight: Weight) -> tuple[np.ndarray, ...]:
    """Four-bit codes and scales."""
    rows, width = num_panels(weight.shape[0]), weight.shape[1]
    codes = np.full((rows, width // 8, PANEL, 4), 0x88, np.uint8)
    scales = np.zeros((rows, width // 32, PANEL), np.float16)
    scatter(weight, [(codes, nibble_pairs), (scales, k_major)], q4_0_fields)
    return codes, scales
