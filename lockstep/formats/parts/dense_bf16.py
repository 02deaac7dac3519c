"""bf16 in 12 bits: another layout of the same numbers, for weights that are read from memory.

The weights of a layer have few exponents. The lower byte of each weight, mantissa and lowest bit of the exponent, is
kept; the upper byte, sign and the other bits of the exponent, is a code of 4 bits into a table. The table has the eight
upper bytes that occur most often, with both signs, of K_BLOCK values of a panel's sixteen features; it lies in a header
for these. A weight with another upper byte is written over after decoding, by a patch; a header has room for eleven. A
weight matrix in which one block needs more keeps its plain panels.

    header, 64 bytes   the table, the groups that have patches (a bit each), and the patches
    group, 192 bytes   8 values of each feature: 128 lower bytes, 64 bytes of codes
"""

from typing import NamedTuple

import numpy as np

from lockstep.formats.parts.dots import nibbles
from lockstep.formats.parts.layout import offset, part_bytes
from lockstep.formats.parts.panels import PANEL
from lockstep.native import targets
from lockstep.native.emit import ir, moved, read, vector, write
from lockstep.native.kernel import native
from lockstep.native.lookup import lookup
from lockstep.native.simd import I1, I8, I16, I32, I64

K_GROUP, K_BLOCK = 8, 128  # values of a feature in a group, and under one header
GROUPS = K_BLOCK // K_GROUP
PAIRS = K_GROUP // 2  # vectors of a group, of two values of each feature
PATCHES, NO_GROUP, NO_CODE = 11, 255, 255
GROUP = np.dtype([("lower", "u1", 2 * 64), ("codes", "u1", 64)])
HEADER = np.dtype(
    [
        ("table", "u1", 16),
        ("patched", "<u2"),
        ("padding", "<u2"),
        ("patches", [("place", "u1"), ("group", "u1"), ("bits", "<u2")], PATCHES),
    ]
)
PATCHED, FIRST_PATCH, PATCH_BYTES = offset(HEADER, "patched"), offset(HEADER, "patches"), part_bytes(HEADER, "patches")
SIGN = 8  # the bit of a code that is the weight's sign
VECTOR_BYTES, LANE_BYTES = 64, 16


def packed(panels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Groups and headers, uint8 [panels, bytes] each, of plain panels, uint16 [panels, K / 2, 16, 2].

    None for a width that is not a multiple of K_BLOCK, and where a block needs more than PATCHES patches.
    """
    num, K = len(panels), panels.shape[1] * 2
    if K % K_BLOCK:
        return None
    groups = np.empty((num, K // K_GROUP, GROUP.itemsize), np.uint8)
    headers = np.zeros((num, K // K_BLOCK), HEADER)
    flat = headers.view(np.uint8).reshape(num, K // K_BLOCK, HEADER.itemsize)
    if not _pack(panels.reshape(num, K // K_BLOCK, GROUPS, PAIRS * PANEL * 2), groups, flat):
        return None
    return groups.reshape(num, -1), flat.reshape(num, -1)


@native
def _pack(blocks, groups, headers):
    """Writes groups and headers; False as soon as a block has too many patches."""
    code_of = np.empty(256, np.uint8)
    for p in range(blocks.shape[0]):
        for i in range(blocks.shape[1]):
            if not _begin_block(blocks[p, i], headers[p, i], code_of):
                return False
            _pack_block(blocks[p, i], groups[p, GROUPS * i : GROUPS * (i + 1)], headers[p, i], code_of)
    return True


@native
def _begin_block(block, header, code_of):
    """Chooses a block's upper bytes, the lower of equally frequent ones first; False where too many others are left."""
    counts = np.zeros(128, np.int64)
    for values in block:
        for bits in values:
            counts[bits >> 8 & 127] += 1
    left = block.size
    code_of[:] = NO_CODE
    for code in range(SIGN):
        best = 0
        for upper in range(128):
            if counts[upper] > counts[best]:
                best = upper
        header[code], header[SIGN + code] = best, best | 128
        if counts[best]:
            code_of[best], code_of[best | 128] = code, SIGN + code
        left, counts[best] = left - counts[best], 0
    return left <= PATCHES


@native
def _pack_block(block, groups, header, code_of):
    num_patches = 0
    for q in range(PATCHES):
        header[FIRST_PATCH + PATCH_BYTES * q + 1] = NO_GROUP
    for g in range(GROUPS):
        groups[g, 2 * VECTOR_BYTES :] = 0
        for place in range(PAIRS * PANEL * 2):
            bits = block[g, place]
            code = code_of[bits >> 8]
            if code == NO_CODE:
                at, code = FIRST_PATCH + PATCH_BYTES * num_patches, 0
                header[at], header[at + 1] = place, g
                header[at + 2], header[at + 3] = bits & 255, bits >> 8
                header[PATCHED + g // 8] |= 1 << g % 8
                num_patches += 1
            # bytes of two vectors lie in turn, eight of each, so that one unpack of lower and upper bytes restores them
            t, lane, j = place // 32, place % 32 // 8, place % 8
            byte = LANE_BYTES * lane + 8 * (t % 2) + j
            groups[g, VECTOR_BYTES * (t // 2) + byte] = bits & 255
            groups[g, 2 * VECTOR_BYTES + byte] |= code << 4 * (t // 2)


class Block(NamedTuple):
    """Where a panel's groups and headers begin: LLVM pointers."""

    groups: ir.Value
    headers: ir.Value


def decoded(b, magic, panel, g):
    """The PAIRS vectors of a panel's group g, as the plain layout has them: int32 [16] with two bf16 each."""
    group = moved(b, panel.groups, b.mul(g, ir.Constant(I64, GROUP.itemsize)))
    block = b.lshr(g, ir.Constant(I64, GROUPS.bit_length() - 1))
    header = moved(b, panel.headers, b.mul(block, ir.Constant(I64, HEADER.itemsize)))
    table, made = read(b, header, vector(I8, 16), 16), []
    both = read(b, moved(b, group, 2 * VECTOR_BYTES), vector(I8, VECTOR_BYTES), VECTOR_BYTES)
    codes = nibbles(b, targets.of(magic), both)
    for half in (0, 1):
        lower = read(b, moved(b, group, VECTOR_BYTES * half), vector(I8, VECTOR_BYTES), VECTOR_BYTES)
        upper = lookup(b, magic, table, codes[half])
        made += [_interleaved(b, lower, upper, first) for first in (0, LANE_BYTES // 2)]
    return [
        b.bitcast(v, vector(I32, PANEL)) for v in _patched(b, header, b.and_(g, ir.Constant(I64, GROUPS - 1)), made)
    ]


def _interleaved(b, lower, upper, first):
    """Eight bytes of every sixteen of both vectors, from `first` on, in turn: halves as int16 [32]."""
    places = [
        lane + first + j + VECTOR_BYTES * which
        for lane in range(0, VECTOR_BYTES, LANE_BYTES)
        for j in range(LANE_BYTES // 2)
        for which in (0, 1)
    ]
    taken = b.shuffle_vector(lower, upper, ir.Constant(vector(I32, VECTOR_BYTES), places))
    return b.bitcast(taken, vector(I16, 2 * PANEL))


def _patched(b, header, g, vectors):
    """The vectors of group g of a block after its patches, which few groups have: these go through memory."""
    bits = b.zext(read(b, moved(b, header, PATCHED), I16, 2), I64)
    before, is_patched = b.block, b.trunc(b.lshr(bits, g), I1)
    with b.goto_entry_block():
        slot = b.alloca(ir.ArrayType(I8, VECTOR_BYTES * (PAIRS + 1)))  # the last part takes patches of other groups
    slot.align = VECTOR_BYTES
    with b.if_then(is_patched, likely=False):
        places = [moved(b, b.bitcast(slot, I8.as_pointer()), VECTOR_BYTES * t) for t in range(PAIRS + 1)]
        for place, v in zip(places, vectors, strict=False):
            write(b, place, v, VECTOR_BYTES)
        for q in range(PATCHES):
            _write_patch(b, moved(b, header, FIRST_PATCH + PATCH_BYTES * q), g, places)
        changed = [read(b, place, v.type, VECTOR_BYTES) for place, v in zip(places, vectors, strict=False)]
        after = b.block
    results = []
    for old, new in zip(vectors, changed, strict=True):
        results.append(b.phi(old.type))
        results[-1].add_incoming(old, before)
        results[-1].add_incoming(new, after)
    return results


def _write_patch(b, patch, g, places):
    byte = lambda at: b.zext(read(b, moved(b, patch, at), I8), I64)
    offset = b.select(
        b.icmp_unsigned("==", byte(1), g), b.mul(byte(0), ir.Constant(I64, 2)), ir.Constant(I64, VECTOR_BYTES * PAIRS)
    )
    write(b, moved(b, places[0], offset), read(b, moved(b, patch, 2), I16, 2), 2)
