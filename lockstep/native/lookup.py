"""Sixteen bytes looked up by codes of 4 bits: one instruction for a register of codes where the target has it.

    x86      PSHUFB, which looks up in each sixteen bytes of a register of 16, 32 or (AVX-512) 64
    ARM      TBL, sixteen bytes at a time
    others   four steps of choosing between halves of the table, by the bits of the code

Numbers of more than a byte are looked up byte by byte: each byte of the result has a table of its own.
"""

from llvmlite import ir
from numba import types

from lockstep.native import targets
from lockstep.native.emit import by_halves, vector
from lockstep.native.simd import I1, I8, I32, I64, constant, i32x16, primitive, splat

ENTRIES = 16


def lookup(b, magic, table, codes):
    """table[code] for every code.

    table: <16 x i8>; codes: bytes 0..15, their number 16 times a power of two. magic: the target, see `kernel.target`.
    """
    num_codes, target = codes.type.count, targets.of(magic)
    if target.shuffle is None:
        return _chosen(b, table, codes)
    if num_codes > target.shuffle_bytes:
        return by_halves(b, lambda b, half: lookup(b, magic, table, half), codes)
    repeated = ir.Constant(vector(I32, num_codes), list(range(ENTRIES)) * (num_codes // ENTRIES))
    return target.shuffle(b, b.shuffle_vector(table, ir.Constant(table.type, ir.Undefined), repeated), codes)


def lookup_own(b, magic, tables, bits):
    """Of each lane's own table of four bytes, the entries that the lane's four codes name: int8 [4 * lanes].

    tables: <lanes x i32>, the entry of code 0 in the lowest byte; bits: <4 * lanes x i8>, a code in the low two bits of
    each byte, above them anything.
    """
    num_codes, target = bits.type.count, targets.of(magic)
    if target.shuffle is None:
        return _chosen_own(b, tables, bits)
    if num_codes > target.shuffle_bytes:
        return by_halves(b, lambda b, *half: lookup_own(b, magic, *half), tables, bits)
    place = ir.Constant(bits.type, [i % ENTRIES // 4 * 4 for i in range(num_codes)])
    codes = b.or_(b.and_(bits, constant(bits.type, 3)), place)
    return target.shuffle(b, b.bitcast(tables, bits.type), codes)


def _chosen(b, table, codes):
    """`lookup` by the bits of the code, the lowest bit first: 15 selects."""
    entries = [splat(b, b.extract_element(table, ir.Constant(I32, i)), codes.type) for i in range(ENTRIES)]
    for bit in range(4):
        bits = b.and_(b.lshr(codes, constant(codes.type, bit)), constant(codes.type, 1))
        is_set = b.trunc(bits, vector(I1, codes.type.count))
        entries = [b.select(is_set, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


def _chosen_own(b, tables, bits):
    """`lookup_own` by the bits of the code: three selects."""
    byte = lambda j: b.and_(b.lshr(tables, constant(tables.type, 8 * j)), constant(tables.type, 255))
    entries = [b.bitcast(b.mul(byte(j), constant(tables.type, 0x01010101)), bits.type) for j in range(4)]
    is_set = lambda bit: b.icmp_signed("!=", b.and_(bits, constant(bits.type, bit)), constant(bits.type, 0))
    low, high = (b.select(is_set(1), entries[j + 1], entries[j]) for j in (0, 2))
    return b.select(is_set(2), high, low)


def table_of(values):
    """Sixteen integers of 8 bits, signed or not, as a constant <16 x i8>."""
    return ir.Constant(vector(I8, ENTRIES), [int(value) & 255 for value in values])


def words_of(values) -> tuple[int, int]:
    """Sixteen integers of 8 bits as the two int64 that `lookup_i8` takes."""
    raw = b"".join((int(value) & 255).to_bytes(1, "little") for value in values)
    return int.from_bytes(raw[:8], "little", signed=True), int.from_bytes(raw[8:], "little", signed=True)


@primitive()
def lookup_i8(context, codes, low, high):
    """The signed bytes of a table for sixteen codes 0..15, as int32. low, high: the table, see `words_of`."""

    def codegen(ctx, b, sig, args):
        table = ir.Constant(vector(I64, 2), ir.Undefined)
        for i, word in enumerate(args[1:]):
            table = b.insert_element(table, word, ir.Constant(I32, i))
        table = b.bitcast(table, vector(I8, ENTRIES))
        found = lookup(b, ctx.codegen().magic_tuple(), table, b.trunc(args[0], vector(I8, ENTRIES)))
        return b.sext(found, i32x16.ir)

    return i32x16(codes, types.int64, types.int64), codegen
