"""BF16: the upper halves of float32, multiplied in pairs with activations that are rounded to bf16, too."""

import ml_dtypes
import numpy as np

from lockstep.formats.format import Dense, Format, Lookup, Packed, Stored
from lockstep.formats.parts import dense_bf16 as dense
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import grouped
from lockstep.formats.parts.products import Product, floats_at
from lockstep.formats.parts.rows import ROUNDED
from lockstep.formats.parts.scalars import upper_half
from lockstep.formats.parts.tiles import outer
from lockstep.native.emit import fma as vector_fma
from lockstep.native.emit import moved, read, spread, write
from lockstep.native.flushing import as_defined, exact_step
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import I32, constant, fma, load_bf16, store

NUMBER = np.dtype(ml_dtypes.bfloat16)
PANEL = np.dtype([("codes", "<u2", (FEATURES, 2))])  # for two k
ZERO = np.float32(0)
SMALLEST_NORMAL = np.float32(2.0**-126)
FLUSH_BELOW = 2.0**-126 - 2.0**-151


@inlined
def daz(x):
    """Denormals are zero, of the same sign."""
    return x * ZERO if abs(x) < SMALLEST_NORMAL else x


@inlined
def flushed_fma(x, w, acc):
    """fma(daz x, daz w, daz acc), then zero iff the exact result is below 2**-126 - 2**-151 in magnitude.

    The product of two bf16 is exact in float64, and the sum exact enough near the bound to tell the side.
    """
    x, w, acc = daz(x), daz(w), daz(acc)
    result, exact = fma(x, w, acc), np.float64(x) * np.float64(w) + np.float64(acc)
    if exact != 0 and abs(exact) < FLUSH_BELOW:
        return ZERO if exact > 0 else -ZERO
    return result


@definition
def dot_bf16(x_K, w_K):
    """sum of x[k] * w[k] for bf16 values held as float32, in pairs, the odd one first.

    Order: acc = f(x[2i], w[2i], f(x[2i+1], w[2i+1], acc)) with f = `flushed_fma`, i ascending from acc = +0: what
      VDPBF16PS does. Source: Intel SDM; 0 mismatches in 96 million lanes on a Zen 5.
    """
    acc = ZERO
    for i in range(0, x_K.size, 2):
        acc = flushed_fma(x_K[i], w_K[i], flushed_fma(x_K[i + 1], w_K[i + 1], acc))
    return acc


@inlined
def row_dot(x, w, n, K):
    return dot_bf16(x, floats_at(w.codes, n, K))


def tile(s):
    """acc = fma(x[2i], w[2i], fma(x[2i+1], w[2i+1], acc)), flushed after each."""

    def sums(pairs):
        def step(i, acc):
            columns = [read(s.b, moved(s.b, w, s.b.mul(i, s.int(PANEL.itemsize))), s.ints, PANEL.itemsize) for w in s.w]
            return pairs(s, i, columns, acc)

        return s.blocks(2, step, PANEL.itemsize)

    return _by_pairs(s, sums)


def dense_tile(s):
    """The same from the layout of 12 bits, which is unpacked for the tiles that follow."""
    plain_bytes = PANEL.itemsize * dense.PAIRS  # of a group
    unpacked = s.pointers(s.unpacked, s.b.mul(s.b.udiv(s.K, s.int(dense.K_GROUP)), s.int(plain_bytes)), s.panels)
    has_followers = s.b.icmp_signed("!=", s.unpacked, s.int(0))
    panels = [dense.Block(*both) for both in zip(s.w, s.scales, strict=True)]

    def sums(pairs):
        def step(g, acc):
            columns = [dense.decoded(s.b, s.magic, panel, g) for panel in panels]
            with s.b.if_then(has_followers):
                for place, column in zip(unpacked, columns, strict=True):
                    for t, values in enumerate(column):
                        write(s.b, moved(s.b, moved(s.b, place, s.b.mul(g, s.int(plain_bytes))), 64 * t), values, 64)
            for t in range(dense.PAIRS):
                i = s.b.add(s.b.mul(g, s.int(dense.PAIRS)), s.int(t))
                acc = pairs(s, i, [column[t] for column in columns], acc)
            return acc

        return s.blocks(dense.K_GROUP, step, dense.GROUP.itemsize, dense.HEADER.itemsize // dense.GROUPS)

    return _by_pairs(s, sums)


def _by_pairs(s, sums):
    """The accumulators that sums(pairs) emits, by the products of pairs that the target has."""
    if s.target.bf16_dot:
        return sums(_pairs_native)

    def by(pairs):
        def emit(start):
            s.start = dict(zip(s.cells, start, strict=True))
            return list(sums(pairs).values())

        return emit

    start = list(s.start.values())
    return dict(zip(s.cells, as_defined(s.b, start, by(_pairs_wide), by(_pairs_exact)), strict=True))


def _pairs_native(s, i, columns, acc):
    """VDPBF16PS: x holds bf16 pairs. It takes denormals as zero and flushes results, whatever MXCSR says."""
    values = [spread(s.b, moved(s.b, x, s.b.mul(i, s.int(4))), I32, s.lanes) for x in s.x]
    return {(r, c): s.target.bf16_dot(s.b, acc[r, c], values[r], columns[c]) for r, c in s.cells}


def _pairs_wide(s, i, columns, acc):
    """The arithmetic of VDPBF16PS in two FMAs: x holds float32 pairs. Needs FLUSH mode."""
    return _two_steps(s, i, columns, acc, vector_fma)


def _pairs_exact(s, i, columns, acc):
    """The same in any mode."""
    return _two_steps(s, i, columns, acc, exact_step)


def _two_steps(s, i, columns, acc, step):
    b, place = s.b, s.b.mul(i, s.int(8))
    odd = [b.bitcast(b.and_(v, constant(s.ints, -65536)), s.floats) for v in columns]
    even = [b.bitcast(b.shl(v, constant(s.ints, 16)), s.floats) for v in columns]
    return outer(s, outer(s, acc, place, 4, odd, step), place, 0, even, step)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    return np.uint32(upper_half(row_B, 2 * i)).view(np.float32)


@inlined
def store_weights(address, scale, out):
    """Stores sixteen weights times scale."""
    store(out, load_bf16(address) * scale)


BF16 = Format(
    "bf16",
    gguf_type=30,
    stored=Stored(
        NUMBER, 1, lambda values: (values,), lambda values: values.astype(np.float32), lambda v: v.astype(NUMBER)
    ),
    packed=Packed(PANEL, 2, lambda values: {"codes": (grouped(2), values.view(np.uint16))}),
    product=Product("bf16", ROUNDED, ("codes",), row_dot),
    tile=tile,
    dense=Dense(dense.packed, dense_tile, dense.K_BLOCK, dense.GROUPS * dense.GROUP.itemsize, dense.HEADER.itemsize),
    lookup=Lookup(weight, store_weights, 16),
    fallback="f32",
    is_choice=True,
    few_rows=4,
    narrow_rows=5,
    flushes=True,
)
