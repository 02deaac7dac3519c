"""What a kernel asks of the machine itself: atomics, waiting, floating-point control, calls by address."""

import platform
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils

from lockstep.runtime import targets
from lockstep.runtime.kernel import inlined
from lockstep.runtime.simd import F32, I8, I32, I64, call, primitive

SPINS_BEFORE_YIELD, FOREVER = 50, 1 << 62
IEEE, FLUSH = 0x1F80, 0x9FC0  # MXCSR: round to nearest, no traps; FLUSH adds flush-to-zero and denormals-are-zero
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
FUTEX_CALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None


@primitive()
def fetch_add(context, address, value):
    """Adds value to the int64 at an address, atomically; returns what was there."""

    def codegen(ctx, b, sig, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@primitive()
def load_acquire(context, address):
    """Reads the int64 at an address with acquire order."""

    def codegen(ctx, b, sig, args):
        return b.load_atomic(b.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@primitive()
def store_release(context, address, value):
    """Writes the int64 at an address with release order."""

    def codegen(ctx, b, sig, args):
        b.store_atomic(args[1], b.inttoptr(args[0], I64.as_pointer()), "release", 8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@primitive()
def pause(context):
    """Tells the core that this is a spin loop."""

    def codegen(ctx, b, sig, args):
        if X86:
            call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return ctx.get_dummy_value()

    return types.void(), codegen


@primitive()
def yield_core(context):
    """Lets another thread run on this core."""

    def codegen(ctx, b, sig, args):
        call(b, "sched_yield", I32, [])
        return ctx.get_dummy_value()

    return types.void(), codegen


@inlined
def wait_until(address, least, spins=FOREVER):
    """Spins until the int64 at an address, which only grows, is at least a number; returns whether it is, which it may
    not be after so many spins. Yields the core early: it may be shared with strangers, or with those who are late."""
    spun = 0
    while load_acquire(address) < least:
        if spun == spins:
            return False
        pause()
        spun += 1
        if spun > SPINS_BEFORE_YIELD:
            yield_core()
    return True


def _wait_somehow(b, address, value):
    if FUTEX_CALL is None:  # no futex: sleep 50 us and look again
        call(b, "usleep", I32, [ir.Constant(I32, 50)])
        return
    zero = ir.Constant(I64, 0)
    syscall = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
    b.call(syscall, [ir.Constant(I64, FUTEX_CALL), address, ir.Constant(I64, 128), value, zero, zero, zero])


@primitive()
def sleep_while_equal(context, address, value):
    """Sleeps while the int32 at an address has this value, until `wake`; may return early."""

    def codegen(ctx, b, sig, args):
        _wait_somehow(b, *args)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@primitive()
def wake(context, address, count):
    """Wakes up to count threads that sleep on an address."""

    def codegen(ctx, b, sig, args):
        if FUTEX_CALL is not None:
            zero = ir.Constant(I64, 0)
            syscall = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
            b.call(syscall, [ir.Constant(I64, FUTEX_CALL), args[0], ir.Constant(I64, 129), args[1], zero, zero, zero])
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@primitive()
def nanoseconds(context):
    """The monotonic clock."""

    def codegen(ctx, b, sig, args):
        slot = cgutils.alloca_once(b, ir.ArrayType(I64, 2))
        clock = 1 if sys.platform == "linux" else 6
        call(b, "clock_gettime", I32, [ir.Constant(I32, clock), b.bitcast(slot, I8.as_pointer())])
        seconds, rest = (b.load(b.gep(slot, [ir.Constant(I32, 0), ir.Constant(I32, i)])) for i in (0, 1))
        return b.add(b.mul(seconds, ir.Constant(I64, 10**9)), rest)

    return types.int64(), codegen


@primitive()
def float_control(context):
    """The floating-point control word of this thread (MXCSR on x86; 0 elsewhere)."""

    def codegen(ctx, b, sig, args):
        if not X86:
            return ir.Constant(I64, 0)
        slot = cgutils.alloca_once(b, I32)
        call(b, "llvm.x86.sse.stmxcsr", ir.VoidType(), [b.bitcast(slot, I8.as_pointer())])
        return b.zext(b.load(slot), I64)

    return types.int64(), codegen


@primitive()
def set_float_control(context, word):
    """Sets the control word. Never in a function that also does arithmetic: LLVM would move it across."""

    def codegen(ctx, b, sig, args):
        if X86:
            slot = cgutils.alloca_once(b, I32)
            b.store(b.trunc(args[0], I32), slot)
            call(b, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [b.bitcast(slot, I8.as_pointer())])
        return ctx.get_dummy_value()

    return types.void(types.int64), codegen


@primitive()
def call_kernel(context, kernel, op, step, thread, num_threads):
    """Calls a kernel by its address; LLVM cannot see through the call."""

    def codegen(ctx, b, sig, args):
        signature = ir.FunctionType(ir.VoidType(), [I64] * 4)
        b.call(b.inttoptr(args[0], signature.as_pointer()), args[1:])
        return ctx.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@primitive()
def float_array(context, address):
    """A float32 pointer for `numba.carray`, as a definition's arrays are made from addresses."""
    return (types.CPointer(types.float32)(types.int64), lambda ctx, b, sig, args: b.inttoptr(args[0], F32.as_pointer()))


@primitive()
def int_array(context, address):
    """An int32 pointer for `numba.carray`."""
    return (types.CPointer(types.int32)(types.int64), lambda ctx, b, sig, args: b.inttoptr(args[0], I32.as_pointer()))


@primitive()
def byte_array(context, address):
    """An int8 pointer for `numba.carray`."""
    return (types.CPointer(types.int8)(types.int64), lambda ctx, b, sig, args: b.inttoptr(args[0], I8.as_pointer()))


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
    """Asks for the cache line at an address, which may be any; how near is the target's choice."""

    def codegen(ctx, b, sig, args):
        locality = targets.prefetch_locality(ctx.codegen().magic_tuple())
        hints = [ir.Constant(I32, hint) for hint in (0, locality, 1)]  # a read, how near, of data
        call(b, "llvm.prefetch.p0", ir.VoidType(), [b.inttoptr(args[0], I8.as_pointer()), *hints])
        return ctx.get_dummy_value()

    return types.void(types.int64), codegen
