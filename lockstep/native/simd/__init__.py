"""SIMD values for kernels written in plain Python.

A kernel is vectorised across independent outputs, 16 float32 lanes at a time (`f32x16`), whatever the target: LLVM
splits the sixteen lanes into as many registers as the machine needs, so one source gives the same bits everywhere.
Every function here works on a scalar `float32` and on lanes alike (a scalar among lanes is broadcast), and, where it
has a Python form, also uncompiled on `np.float32`: a definition can be run by an interpreter that shares no compiler
with the kernels.

Other modules import from this package: `types` defines the values, `math`, `memory` and `lanes` the functions on them.
"""

from lockstep.native.simd.lanes import (
    bit_and,
    bit_xor,
    high_product,
    lane_numbers,
    lanes,
    max_lanes,
    shift_right,
    sum_lanes,
    to_f32,
    to_i32,
)
from lockstep.native.simd.math import (
    absolute,
    bf16_bits,
    bf16_f32,
    exponent,
    fma,
    mantissa,
    maximum,
    minimum,
    pow2,
    rint,
    round_bf16,
    sqrt,
    where_below,
)
from lockstep.native.simd.memory import (
    load,
    load_bf16,
    load_f16,
    load_i8,
    load_i32,
    load_u8,
    peek,
    peek_bf16,
    peek_f16,
    poke,
    store,
    store_bf16,
    store_i8,
)
from lockstep.native.simd.types import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    LANES,
    call,
    constant,
    emitted,
    f32x16,
    i32x16,
    primitive,
    read_at,
    splat,
    widened,
    write_at,
)
