"""What a kernel asks of the machine itself: atomics, waiting, floating-point control, calls by address."""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from lockstep.native import emit, targets
from lockstep.native.kernel import inlined
from lockstep.native.simd import F32, I8, I32, I64, call, emitted, primitive
from lockstep.native.system import SYSTEM
from lockstep.native.targets import ISA

SPINS_BEFORE_YIELD, FOREVER = 50, 1 << 62
IEEE, FLUSH = ISA.IEEE, ISA.FLUSH


@emitted(types.int64(types.int64, types.int64))
def fetch_add(b, address, value):
    """Adds value to the int64 at an address, atomically, sequentially consistent; returns what was there."""
    return b.atomic_rmw("add", b.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@emitted(types.int64(types.int64))
def load_acquire(b, address):
    """Reads the int64 at an address with acquire order."""
    return b.load_atomic(b.inttoptr(address, I64.as_pointer()), "acquire", 8)


@emitted(types.int64(types.int64))
def load_in_order(b, address):
    """Reads the int64 at an address, sequentially consistent: in one order with every `fetch_add`."""
    return b.load_atomic(b.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


@emitted(types.void(types.int64, types.int64))
def store_release(b, address, value):
    """Writes the int64 at an address with release order."""
    b.store_atomic(value, b.inttoptr(address, I64.as_pointer()), "release", 8)


@emitted(types.void())
def pause(b):
    """Tells the core that this is a spin loop."""
    ISA.pause(b)


@emitted(types.void())
def yield_core(b):
    """Lets another thread run on this core."""
    call(b, "sched_yield", I32, [])


@inlined
def wait_until(address, least, spins=FOREVER):
    """Spins until the int64 at an address, which only grows, is at least `least`; False after `spins` spins in vain.

    Yields the core early: the thread that is waited for, or another program, may need this core.
    """
    spun = 0
    while load_acquire(address) < least:
        if spun == spins:
            return False
        pause()
        spun += 1
        if spun > SPINS_BEFORE_YIELD:
            yield_core()
    return True


@emitted(types.void(types.int64, types.int64))
def sleep_while_equal(b, address, value):
    """Sleeps while the int32 at an address has this value, until `wake`; may return early."""
    SYSTEM.sleep_while_equal(b, address, value)


@emitted(types.void(types.int64, types.int64))
def wake(b, address, num_threads):
    """Wakes up to num_threads threads, or all, that sleep on an address."""
    SYSTEM.wake(b, address, num_threads)


@emitted(types.int64())
def nanoseconds(b):
    """The monotonic clock."""
    slot = cgutils.alloca_once(b, ir.ArrayType(I64, 2))
    call(b, "clock_gettime", I32, [ir.Constant(I32, SYSTEM.CLOCK), b.bitcast(slot, I8.as_pointer())])
    seconds, rest = (b.load(b.gep(slot, [ir.Constant(I32, 0), ir.Constant(I32, i)])) for i in (0, 1))
    return b.add(b.mul(seconds, ir.Constant(I64, 10**9)), rest)


@emitted(types.int64())
def float_control(b):
    """The floating-point control word of this thread."""
    return ISA.read_control(b)


@emitted(types.void(types.int64))
def set_float_control(b, word):
    """Sets the control word. Never in a function that also does arithmetic: LLVM would move the arithmetic across."""
    ISA.write_control(b, word)


@emitted(types.void(), python=lambda: None)
def kept_apart(b):
    """Keeps the function that calls this from being inlined, so that arithmetic moves neither into it nor out of it."""
    b.function.attributes.discard("alwaysinline")  # Numba passes it on from a caller that is inlined
    b.function.attributes.add("noinline")


@emitted(types.void(*[types.int64] * 5))
def call_kernel(b, kernel, op, step, thread, num_threads):
    """Calls a kernel by its address; LLVM cannot see through the call."""
    signature = ir.FunctionType(ir.VoidType(), [I64] * 4)
    b.call(b.inttoptr(kernel, signature.as_pointer()), [op, step, thread, num_threads])


@emitted(types.CPointer(types.float32)(types.int64))
def float_array(b, address):
    """A float32 pointer for `numba.carray`, as a definition's arrays are made from addresses."""
    return b.inttoptr(address, F32.as_pointer())


@emitted(types.CPointer(types.int32)(types.int64))
def int_array(b, address):
    """An int32 pointer for `numba.carray`."""
    return b.inttoptr(address, I32.as_pointer())


@emitted(types.CPointer(types.int8)(types.int64))
def byte_array(b, address):
    """An int8 pointer for `numba.carray`."""
    return b.inttoptr(address, I8.as_pointer())


@primitive()
def stack_memory(context, num_bytes):
    """Address of num_bytes (a literal) of the calling kernel's stack, on a cache line: a thread's own scratch."""
    size = num_bytes.literal_value

    def codegen(ctx, b, sig, args):
        with b.goto_entry_block():  # not alloca_once: its zero fill of a large array takes LLVM minutes
            slot = b.alloca(ir.ArrayType(I8, size))
        slot.align = 64
        return b.ptrtoint(slot, I64)

    return types.int64(num_bytes), codegen


@primitive()
def prefetch(context, address):
    """Prefetches the cache line at an address, which may be any, into the cache that suits the target."""

    def codegen(ctx, b, sig, args):
        cpu = targets.Cpu(*ctx.codegen().magic_tuple())
        emit.prefetch(b, emit.pointer(b, args[0]), ISA.prefetch_locality(cpu))
        return ctx.get_dummy_value()

    return types.void(types.int64), codegen
