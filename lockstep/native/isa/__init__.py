"""What depends on the instruction set: a file for each family of targets, and in it a `Target` for each.

A file of an instruction set (x86.py, aarch64.py, other.py) holds what its targets share, under the same names:

    IEEE, FLUSH             floating-point control words: round to nearest without traps; with denormals as zero
    FLUSHING                what FLUSH does, see `native.flushing`
    FUTEX                   Linux's number of the system call; None where there is none
    pause(b)                tells the core that this is a spin loop
    read_control(b)         the control word of this thread, int64
    write_control(b, word)  sets it
    barrier(b, v, clobber)  a vector behind an empty instruction that LLVM cannot see through
    underflowed(b)          where FLUSHING is "before rounding": whether a result has underflowed
    clear_underflow(b)      since this
    line_bytes(cpu)         of a cache line
    prefetch_locality(cpu)  LLVM's number of the cache that weights and keys are prefetched into: 3, the first level,
                            where it has room for more than the data at hand, else 2, the second
                            (see studies/15-one-stream.md)
    ahead_bytes(lanes, register_lanes)  how far ahead a single stream of weights is prefetched by tiles of vectors of so
                            many lanes, which are one register or several; 0: not at all

`b` is the LLVM builder. Another target is a file that ends with a `Target` (target.py says what that is), and a place
in TARGETS of `native/targets.py`.
"""
