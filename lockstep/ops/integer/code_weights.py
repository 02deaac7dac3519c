"""Weights as integer codes with a scale and a zero point for each output row, and the layouts that kernels read.

    panels   [panel][k / 4][16][4] int8 codes, k up to a multiple of 32 (plus 128 where the target's dot takes unsigned
             weights), and for each panel [4][16] words: float32 scale, int32 zero, int32 sum of (code - zero), and
             int32 start of the sums of products
    rows     codes int8 [N, K], scale float32 [N], zero int32 [N], for the definition

AVX2 multiplies |code| with a, or with -a - 1 instead of -a where the code is negative, which is |code| too little, so
its sums start with minus the sum of the negative codes.
"""

from dataclasses import dataclass

import numpy as np

from lockstep.formats.pack import scatter
from lockstep.formats.parts.panels import PANEL, in_fours, k_major, num_panels, padded_width
from lockstep.native.targets import TARGET
from lockstep.ops.integer.code_rows import plane_bytes
from lockstep.runtime.backend import Layout
from lockstep.runtime.program import Weight

FORMAT = "codes"  # of weights whose parts are CodeTensors


@dataclass(frozen=True)
class CodeTensor:
    """A matrix [N, K] of weights (code - zero) * scale.

    codes: int8 [N, K]. scale: float32 [N]. zero: int32 [N], from -128 to 127. ValueError for anything else.
    """

    name: str
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    format: str = FORMAT

    def __post_init__(self) -> None:
        expected = dict(codes=(np.int8, self.codes.shape), scale=(np.float32, self.rows), zero=(np.int32, self.rows))
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape or self.codes.ndim != 2:
                raise ValueError(
                    f"weight {self.name!r}: {name} is {array.dtype}{list(array.shape)}, expected "
                    f"{np.dtype(dtype)}{list(shape)}: integer arithmetic takes one scale and one zero point for each "
                    f"output row"
                )
        if ((self.zero < -128) | (self.zero > 127)).any():
            raise ValueError(
                f"weight {self.name!r}: a zero point is outside int8, expected codes and zeros in one range"
            )

    @property
    def rows(self) -> tuple[int, ...]:
        return self.codes.shape[:1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


def code_tensor(name: str, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> CodeTensor:
    """Codes of at most 8 bits, signed or unsigned, in any integer type. ValueError for codes of more, and for scales of
    groups of columns.

    codes: [N, K]. scale, zero: one number, or one for each row, whatever their type: [1, 1], [N, 1] or [N]. Codes above
    127 are kept as code - 128, as their zero points are.
    """
    scale, zero = (_of_rows(name, array, len(codes)) for array in (scale, zero))
    low, high = int(min(codes.min(), zero.min())), int(max(codes.max(), zero.max()))
    shift = 128 if high > 127 else 0
    if low - shift < -128 or high - shift > 127:
        raise ValueError(f"weight {name!r}: codes and zero points from {low} to {high}, expected -128..127 or 0..255")
    shifted = (codes.astype(np.int16) - np.int16(shift)).astype(np.int8)
    return CodeTensor(name, shifted, scale.astype(np.float32), zero.astype(np.int32) - np.int32(shift))


def _of_rows(name: str, array: np.ndarray, num_rows: int) -> np.ndarray:
    """Scales or zero points as [num_rows]."""
    if array.size not in (1, num_rows) or array.shape not in ((array.size,), (array.size, 1)):
        raise ValueError(
            f"weight {name!r}: scales or zero points {list(array.shape)}, expected one, or one for each of {num_rows} "
            f"rows: groups of columns have no integer kernel"
        )
    return np.broadcast_to(array.reshape(-1), (num_rows,))


def code_weight(name: str, *parts: CodeTensor) -> Weight:
    """A weight of code tensors with the same K, top to bottom."""
    N, K = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if any(part.shape[1] != K for part in parts):
        raise ValueError(f"weight {name!r}: parts of {', '.join(str(part.shape[1]) for part in parts)} values a row")
    return Weight(name, FORMAT, (N, K), parts)


def pack_panels(weight: Weight) -> tuple[np.ndarray, ...]:
    """New panels of a weight: codes uint8 and words int32."""
    panels, offset = num_panels(weight.shape[0]), _offset()
    codes = np.full((panels, plane_bytes.py_func(weight.shape[1]) // 4, PANEL, 4), offset, np.uint8)
    words = np.zeros((panels, 4, PANEL), np.int32)
    words[:, 1] = offset
    fill_panels(weight, codes, words)
    return codes, words


def fill_panels(weight: Weight, codes: np.ndarray, words: np.ndarray) -> None:
    """Writes a weight to panels that were made for another weight of the same shape."""
    K, padded, offset = weight.shape[1], codes.shape[1] * 4, _offset()
    is_less = TARGET.tiles.LESS_NEGATIVE

    def convert(part: CodeTensor, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        part_codes, zero = part.codes[rows], part.zero[rows]
        total = part_codes.sum(1, dtype=np.int32)
        start = -np.minimum(part_codes, 0).sum(1, dtype=np.int32) if is_less else np.zeros_like(total)
        fields = part.scale[rows].view(np.int32), zero + offset, total - K * zero, start
        return np.pad(part_codes.view(np.uint8) + np.uint8(offset), ((0, 0), (0, padded - K))), np.stack(fields, 1)

    scatter(weight, [(codes, in_fours), (words, k_major)], convert)


def _offset() -> int:
    """What is added to codes and zero points in panels."""
    return 128 if TARGET.unsigned else 0


def stacked_rows(weight: Weight) -> tuple[np.ndarray, ...]:
    """Codes, scales and zero points of all rows, with zeros up to whole panels."""
    pieces = zip(*((part.codes, part.scale, part.zero) for part in weight.parts), strict=True)
    missing = padded_width(weight.shape[0]) - weight.shape[0]
    return tuple(np.concatenate([*piece, np.zeros((missing, *piece[0].shape[1:]), piece[0].dtype)]) for piece in pieces)


PANELS = Layout("panels of codes", pack_panels, ("codes", "d"))
ROWS = Layout("rows of codes", stacked_rows, ("codes", "d", "m"))
