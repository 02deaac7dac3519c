"""Emitting LLVM for register tiles: Python that runs while a kernel is compiled and writes the kernel's instructions.

In all code that emits LLVM, here and elsewhere, `b` is the LLVM builder (`ir.IRBuilder`), a `place` is a pointer to
bytes and an `address` an int64. A Python `for` becomes unrolled code; `counted` emits a loop.
"""

from llvmlite import ir

from lockstep.native.simd import F16, F32, I8, I16, I32, I64, call, splat


class BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloat)

    def __hash__(self):
        return hash(BFloat)


BF16 = BFloat()


def vector(element, num_lanes):
    return ir.VectorType(element, num_lanes)


def pointer(b, address):
    """An address as a pointer to bytes."""
    return b.inttoptr(address, I8.as_pointer())


def moved(b, place, offset):
    """The pointer `offset` bytes further on; offset: a Python int, or an int64 value of the kernel."""
    if isinstance(offset, int):
        return b.gep(place, [ir.Constant(I64, offset)]) if offset else place
    return b.gep(place, [offset])


def read(b, place, llvm_type, align=1):
    """Loads from a pointer."""
    loaded = b.load(b.bitcast(place, llvm_type.as_pointer()))
    loaded.align = align
    return loaded


def write(b, place, value, align=1):
    """Stores at a pointer."""
    b.store(value, b.bitcast(place, value.type.as_pointer())).align = align


def prefetch(b, place, locality):
    """Prefetches the cache line at a pointer, which may point anywhere. locality: see `native.isa`."""
    hints = [ir.Constant(I32, hint) for hint in (0, locality, 1)]  # a read, its locality, of data
    call(b, "llvm.prefetch.p0", ir.VoidType(), [place, *hints])


def spread(b, place, scalar, lanes, align=4):
    """The scalar at a pointer, in all lanes."""
    return splat(b, read(b, place, scalar, align), vector(scalar, lanes))


def spread4(b, place, lanes):
    """The four bytes at a pointer, repeated in every lane: int8 [4 * lanes]."""
    return b.bitcast(spread(b, place, I32, lanes), vector(I8, 4 * lanes))


def fma(b, x, y, z):
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, [x, y, z])


def halves_f32(b, place, lanes):
    """float16 at a pointer, widened to float32."""
    return b.fpext(read(b, place, vector(F16, lanes), 2 * lanes), vector(F32, lanes))


def bytes_f32(b, place, lanes):
    """uint8 at a pointer, as float32."""
    raw, wide = read(b, place, vector(I8, lanes), lanes), vector(I32, lanes)
    return b.uitofp(b.zext(raw, wide), vector(F32, lanes))


def rounded_bytes(b, v):
    """float32 lanes, rounded to the nearest integers, ties to even, which fit into a byte: as int32, and as int8."""
    rounded = b.fptosi(call(b, f"llvm.roundeven.v{v.type.count}f32", v.type, [v]), vector(I32, v.type.count))
    return rounded, b.trunc(rounded, vector(I8, v.type.count))


def cut(b, v, start, num_lanes):
    """Lanes start .. start + num_lanes."""
    lanes = ir.Constant(vector(I32, num_lanes), list(range(start, start + num_lanes)))
    return b.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), lanes)


def join(b, low, high):
    """Two vectors as one."""
    num_lanes = low.type.count * 2
    return b.shuffle_vector(low, high, ir.Constant(vector(I32, num_lanes), list(range(num_lanes))))


def by_halves(b, step, *operands):
    """step(b, *halves) of the lower and of the upper halves of the operands, joined."""
    half = lambda v, h: cut(b, v, v.type.count // 2 * h, v.type.count // 2)
    return join(b, *(step(b, *(half(v, h) for v in operands)) for h in (0, 1)))


def words(b, v):
    """The same bits as int16 lanes."""
    size = v.type.count * v.type.element.width
    return b.bitcast(v, vector(I16, size // 16))


def counted(b, num_rounds, carried, body):
    """for i in range(num_rounds): carried = body(i, carried), with at least 1 round. Returns the last values."""
    entry, loop = b.block, b.append_basic_block("loop")
    b.branch(loop)
    b.position_at_end(loop)
    index = b.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), entry)
    phis = [b.phi(v.type) for v in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, entry)
    values = body(index, phis)
    following = b.add(index, ir.Constant(I64, 1))
    end, done = b.block, b.append_basic_block("done")
    b.cbranch(b.icmp_signed("<", following, num_rounds), loop, done)
    for phi, value in zip([index, *phis], [following, *values], strict=True):
        phi.add_incoming(value, end)
    b.position_at_end(done)
    return values
