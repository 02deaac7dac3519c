"""What a weight format is: how a checkpoint stores it, how it is packed, multiplied and looked up."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.e4m3 import E4M3
from lockstep.formats.parts.layout import offset
from lockstep.formats.parts.panels import PANEL, Placed
from lockstep.formats.parts.powers import E8M0
from lockstep.formats.parts.products import Product

LINE_BYTES = 64  # of a cache line
CODE_VECTORS = 8  # of the codes of 32 weights, four of each feature in a vector
UNSIGNED = (E8M0, E4M3)  # kinds of scales without a sign
SCALE_KINDS = (np.dtype("<f2"), np.dtype("<f4"), *UNSIGNED)  # of fields of stored blocks
SCALES = np.dtype([("d", "<f2", PANEL)])  # of a panel, for 32 weights of each feature


class Stored(NamedTuple):
    """A block of `size` weights as a checkpoint has it; formats of plain numbers have blocks of one.

    unpack: blocks [..., blocks] to the fields of their rows, as `Product.arrays` names them: codes [..., K], and fields
    that several weights share [..., fewer]. decode: blocks [num] to float32 [num, size]. encode: the reverse, rounded;
    None: no tensor is converted to the format.
    """

    block: np.dtype
    size: int
    unpack: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    decode: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray] | None = None


class Packed(NamedTuple):
    """A panel of sixteen features, as kernels read them, for `size` weights of each.

    arrange: the fields of rows to {path of a field of panel or scales: (its arrangement, values [rows, ...])}. scales:
    one element of a separate stream of scales, where they are not in the panel: for as many weights as a stored block
    has or, if per_row, for a row.
    """

    panel: np.dtype
    size: int
    arrange: Callable[..., Placed]
    scales: np.dtype | None = None
    per_row: bool = False

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays of a packed weight, as `operands.WeightArrays` has them."""
        return ("codes",) if self.scales is None else ("codes", "d")


class Dense(NamedTuple):
    """A second layout of the panels of a format without scales, in fewer bytes: groups, and a stream of headers.

    packed: plain panels to both arrays, uint8 [panels, bytes] each, or None where it does not pay. tile: as
    `Format.tile`; the first of several also writes plain panels, which the others read. block_size:
    weights of a feature under one header, which must divide a row; group_bytes, header_bytes: a panel's, for so many.
    """

    packed: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray] | None]
    tile: Callable[[Any], dict]
    block_size: int
    group_bytes: int
    header_bytes: int


class Lookup(NamedTuple):
    """How rows of a table of embeddings are decoded from the bytes of the checkpoint.

    weight: the definition: (row int8 [bytes], i) to weight i of a row. store: the kernel's function: (address of
    num_weights weights, scale, address to write to) stores them as float32, times scale.
    """

    weight: Any
    store: Any
    num_weights: int


@dataclass(frozen=True, eq=False)
class Format:
    """A weight format.

    times: the name of the format as which weights times a factor are read, and (rows as stored, factor) to its rows;
    None: no file has factors beside this format.

    gguf_type: GGML's number of the format; None for one that GGUF files do not have. zero: the zero point of codes, as
    `unpack` has them. table: the integers that codes stand for, int8; None: codes are multiplied themselves. tile:
    emits the product of a tile of prepared rows and panels, for a `tiles.Site`. fallback: the format of rows that its
    blocks, or those of prepared rows, do not fill. is_choice: whether `--weights` may name it. few_rows: up to this
    many rows share each panel while it streams by, where registers hold sixteen lanes; more rows are bound by
    arithmetic, or by loads. narrow_rows: the most rows of a tile where registers hold eight lanes: sixteen registers
    hold the sums and what panels are widened to. tall_tiles: whether tiles of many rows have one panel and twice the
    height, because unpacking codes takes longer than loading activations. one_row_ahead: how many bytes ahead weights
    are prefetched for one row; None: as for more rows, see `native.isa`. unpacked: how many vectors of a line a
    panel has for 32 weights, unpacked once for all tiles of many rows, see `tiles.Site.unpack`; 0: each tile unpacks
    them. is_signed: whether codes are multiplied as signed bytes, see `unpacked_on`. dense: the layout that linear
    layers read where it pays. flushes: see `runtime.step.FLUSHES`. made_up_scale:
    the scale of random blocks, in formats without `encode`.
    """

    name: str
    gguf_type: int | None
    stored: Stored
    packed: Packed
    product: Product
    tile: Callable[[Any], dict]
    lookup: Lookup
    dense: Dense | None = None
    fallback: str | None = None
    zero: int = 0
    table: np.ndarray | None = None
    is_choice: bool = False
    few_rows: int = 8
    narrow_rows: int = 6
    tall_tiles: bool = False
    one_row_ahead: int | None = None
    unpacked: int = 0
    is_signed: bool = False
    flushes: bool = False
    made_up_scale: float = 0.0
    times: tuple[str, Callable[[np.ndarray, np.float32], np.ndarray]] | None = None

    def __post_init__(self) -> None:
        """Kernels read codes by whole cache lines."""
        codes, panel = offset(self.packed.panel, "codes"), self.packed.panel.itemsize
        if self.is_quantized and (codes % LINE_BYTES or panel % LINE_BYTES):
            raise ValueError(
                f"{self.name}: codes at byte {codes} of panels of {panel}, expected multiples of {LINE_BYTES}"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether weights are blocks of codes, which a checkpoint has as rows of bytes."""
        return self.stored.size > 1

    def unpacked_on(self, target: Any) -> int:
        """`unpacked` on a target, which may have signed bytes as more vectors than their codes."""
        more = target.tiles.SIGN_VECTORS if self.is_signed else 0
        return max(self.unpacked, CODE_VECTORS) + more if more else self.unpacked

    @property
    def preparation(self) -> str:
        """The kind of op that prepares rows for these weights; "" if rows are multiplied as they are."""
        return self.product.rows.preparation

    @property
    def block_size(self) -> int:
        """Weights of a block as stored."""
        return self.stored.size

    @property
    def block_bytes(self) -> int:
        """Bytes of a block as stored."""
        return self.stored.block.itemsize

    @property
    def scale_fields(self) -> tuple[tuple[int, np.dtype], ...]:
        """Where the scales of a stored block lie, and their dtypes: float16, float32, E8M0 or E4M3."""
        fields = [(kind, begin) for kind, begin, *_ in (self.stored.block.fields or {}).values()]
        scales = [(kind.base, begin, math.prod(kind.shape)) for kind, begin in fields if kind.base in SCALE_KINDS]
        return tuple((begin + n * kind.itemsize, kind) for kind, begin, num in scales for n in range(num))

    def put_scales(self, blocks: np.ndarray, scales: Any) -> None:
        """Sets all scales of stored blocks, uint8 [..., block_bytes], to float32 numbers that broadcast to [...].

        Scales without a sign get magnitudes, rounded as their kind is.
        """
        for begin, kind in self.scale_fields:
            values = np.broadcast_to(np.asarray(scales, np.float32), blocks.shape[:-1])
            rounded = (np.abs(values) if kind in UNSIGNED else values).astype(kind)
            blocks[..., begin : begin + kind.itemsize] = np.ascontiguousarray(rounded)[..., None].view(np.uint8)

    def panel_bytes(self, width: int) -> int:
        """Bytes of a packed panel of `width` weights for each of its features, its scales included."""
        return width // self.packed.size * self.packed.panel.itemsize + self.scale_bytes(width)

    def scale_bytes(self, width: int) -> int:
        """Bytes of the stream of scales of such a panel; 0 without a stream."""
        if self.packed.scales is None:
            return 0
        return self.packed.scales.itemsize * (1 if self.packed.per_row else width // self.stored.size)

    def fits(self, width: int) -> bool:
        """Whether rows of `width` weights can be multiplied in this format."""
        return width % self.stored.size == 0 and width % self.product.rows.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row as stored; raises ValueError unless blocks fill it exactly."""
        return blk.row_bytes(columns, self.stored.size, self.stored.block)

    def split(self, packed: np.ndarray) -> tuple[np.ndarray, ...]:
        """Fields of packed rows uint8 [..., bytes]; ValueError unless these are whole blocks."""
        return self.stored.unpack(blk.as_blocks(packed, self.stored.block))

    def dequantize(self, packed: np.ndarray) -> np.ndarray:
        """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: at most the rounding of one addition."""
        return blk.decoded(packed, self.stored.size, self.stored.block, self.stored.decode)

    def data_of(self, weights: np.ndarray) -> np.ndarray:
        """Finite weights [..., K] as a checkpoint's array has them: blocks as rows of bytes, numbers in their dtype."""
        assert self.stored.encode is not None, self.name
        return self.quantize(weights) if self.is_quantized else self.stored.encode(weights)

    def quantize(self, weights: np.ndarray) -> np.ndarray:
        """Finite weights [..., K] to packed rows uint8 [..., bytes], as the format's `encode` rounds them."""
        assert self.stored.encode is not None, self.name
        return blk.encoded(weights, self.stored.size, self.stored.block, self.stored.encode)
