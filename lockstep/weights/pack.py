"""Weights in the layouts that kernels read: panels of sixteen output features, K in the order of the reduction.

    f32, f16   [panel][k][16]                          bf16   [panel][k / 2][16][2]
    q8_0       codes  [panel][k / 4][16][4]  8 bit     scales [panel][k / 32][16] float16
    q4_0       codes  [panel][k / 8][16][4]  low nibbles k..k+3, high nibbles k+4..k+7; scales as q8_0

The last panels are filled with zeros up to an even number of panels, so that a kernel may always take two.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lockstep.runtime.program import Weight
from lockstep.runtime.targets import unsigned_weights
from lockstep.weights import q4_0, q8_0
from lockstep.weights.tensor import BLOCK_FORMATS, StoredTensor, check_finite

Arrange = Callable[[np.ndarray], np.ndarray]
Output = tuple[np.ndarray, Arrange]
PANEL = 16
ROWS_AT_ONCE = 64 * PANEL  # packing works through a tensor in pieces of so many rows


def num_panels(num_features: int) -> int:
    """Panels of a packed weight: an even number."""
    return -(-num_features // (2 * PANEL)) * 2


def padded_width(num_features: int) -> int:
    """Columns of a linear layer's output: features rounded up to whole panels."""
    return -(-num_features // PANEL) * PANEL


def _pieces(weight: Weight) -> Iterator[tuple[int, StoredTensor, slice]]:
    """(first row, float32 or stored blocks) of a weight, piece by piece: (row, part, slice)."""
    row = 0
    for part in weight.parts:
        count = part.shape[0]
        for start in range(0, count, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, count))
            yield row + start, part, rows
        row += count


floats = StoredTensor.finite_f32


def block_fields(part: StoredTensor, rows: slice, format: str) -> tuple[np.ndarray, ...]:
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


def _quantized(part: StoredTensor, rows: slice, block: ModuleType) -> np.ndarray:
    values = floats(part, rows)
    try:
        return block.quantize(values)
    except ValueError as error:
        raise ValueError(f"tensor {part.name!r}: {error}") from None


q8_0_fields = partial(block_fields, format="q8_0")
q4_0_fields = partial(block_fields, format="q4_0")


def low_and_high(fields: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Codes as their bits from the fifth on and their low four, and the other fields."""
    codes, *rest = fields
    return codes >> 4, codes & 15, *rest


def scatter(
    weight: Weight, outputs: Iterable[Output], convert: Callable[[StoredTensor, slice], Iterable[np.ndarray]]
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


def k_major(values: np.ndarray) -> np.ndarray:
    """[panels, 16, K] to [panels, K, 16]."""
    return values.transpose(0, 2, 1)


def grouped(size: int) -> Arrange:
    """[panels, 16, K] to [panels, K / size, 16, size]."""
    return lambda v: v.reshape(v.shape[0], PANEL, -1, size).transpose(0, 2, 1, 3)


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


def nibble_pairs(values: np.ndarray) -> np.ndarray:
    """Codes [panels, 16, K] to bytes [panels, K / 8, 16, 4]."""
    grouped = values.reshape(values.shape[0], PANEL, -1, 2, 4).transpose(0, 2, 1, 3, 4)
    return grouped[..., 0, :] | (grouped[..., 1, :] << 4)


def fifth_bits(values: np.ndarray) -> np.ndarray:
    """Bits 0 or 1 [panels, 16, K] to bytes [panels, K / 32, 16, 4]: bit g of byte j is that of k = 4 g + j."""
    eight = values.reshape(values.shape[0], PANEL, -1, 8, 4)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(eight.astype(np.uint8) << shifts, axis=3).transpose(0, 2, 1, 3)


def in_blocks(arrange: Arrange, per_block: int, *parts: int) -> Arrange:
    """An arrangement of [panels, 16, per_block * blocks of a row] as [panels, blocks, *parts, values of a part]."""
    return lambda v: arrange(v).reshape(v.shape[0], v.shape[2] // per_block, *parts, -1)


def block_field(blocks: np.ndarray, start: int, count: int, dtype: npt.DTypeLike = np.uint8) -> np.ndarray:
    """A field of every block, `start` bytes into it: uint8 [panels, blocks, bytes] as dtype [panels, blocks, count]."""
    return blocks[..., start : start + count * np.dtype(dtype).itemsize].view(dtype)


def pack_q4_0(weight: Weight) -> tuple[np.ndarray, ...]:
    """Four-bit codes and scales."""
    rows, width = num_panels(weight.shape[0]), weight.shape[1]
    codes = np.full((rows, width // 8, PANEL, 4), 0x88, np.uint8)
    scales = np.zeros((rows, width // 32, PANEL), np.float16)
    scatter(weight, [(codes, nibble_pairs), (scales, k_major)], q4_0_fields)
    return codes, scales
