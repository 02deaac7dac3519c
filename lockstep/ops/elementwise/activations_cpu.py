"""Preparation of the input rows of linear layers: the fast kernels, alone and fused with the op that makes the row.

The values of a block of 32 are made and quantized in registers; nothing goes through memory in between. Bound by the
read of the row. Fused kernels give the bits of the op followed by `quantize_q8` or `round_bf16`.
"""

from lockstep.native.kernel import inlined, variant
from lockstep.native.numbers import float32, int32
from lockstep.native.simd import (
    absolute,
    load,
    max_lanes,
    maximum,
    poke,
    rint,
    round_bf16,
    store,
    store_bf16,
    store_i8,
    sum_lanes,
    to_i32,
    where_below,
)
from lockstep.ops.elementwise.activations import (
    BIAS,
    BLOCK,
    BLOCK_BYTES,
    HIGHEST,
    INFINITY,
    NATIVE_BF16,
    ONE_127TH,
    SCALE,
    SCALED_BIAS,
    SMALLEST,
    SUMS,
    ZERO,
    Preparation,
    bf16_bytes,
    magnitude,
    q8_bytes,
)
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.gates import GATES
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.elementwise.rms_norm_cpu import inverse_rms
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

# constants of a variant: functions that store 32 values, and count bytes of a row; whether one thread does all rows;
# one of GATES
PUT = ROW_BYTES = ONE_THREAD = GATE = None


@inlined
def finite(x):
    """x, or zero for NaN and infinities."""
    return where_below(absolute(x), INFINITY, x, ZERO)


@inlined
def store_q8(low, high, out, K, i):
    """Quantizes elements i .. i + 31 of a row, given as two vectors."""
    amax = max_lanes(maximum(magnitude(low), magnitude(high)))
    scale, inverse = amax * ONE_127TH, HIGHEST / amax
    if amax < SMALLEST:
        scale, inverse = ZERO, ZERO
    low_codes, high_codes = to_i32(rint(finite(low) * inverse)), to_i32(rint(finite(high) * inverse))
    first, last, place = sum_lanes(low_codes), sum_lanes(high_codes), out + i // BLOCK * BLOCK_BYTES
    store_i8(place, low_codes)
    store_i8(place + 16, high_codes)
    poke(place + SCALE, float32(scale))
    bias = int32(-128 * (first + last))
    poke(place + BIAS, bias)
    poke(place + SCALED_BIAS, float32(float32(bias) * scale))
    poke(place + SUMS, int32(last * 65536 + (first & 65535)))


@inlined
def store_rounded(low, high, out, K, i):
    """Rounds elements i .. i + 31 of a row to bf16."""
    if NATIVE_BF16:
        store_bf16(out + 2 * i, round_bf16(low))
        store_bf16(out + 2 * i + 32, round_bf16(high))
    else:
        store(out + 4 * i, round_bf16(low))
        store(out + 4 * i + 64, round_bf16(high))


def plain(op, step, thread, num_threads):
    """Prepares the rows of x."""
    a = Preparation.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        x, out = a.x + 4 * a.width * t, a.out + ROW_BYTES(a.width) * t
        for i in range(0, a.width, 32):
            PUT(load(x + 4 * i), load(x + 4 * i + 64), out, a.width, i)


def normed(op, step, thread, num_threads):
    """`rms_norm`, then the preparation."""
    a = RmsNorm.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        x, out = a.x + 4 * a.width * t, a.out + ROW_BYTES(a.width) * t
        scale = inverse_rms(x, a.width, a.eps)
        for i in range(0, a.width, 32):
            low = (load(x + 4 * i) * scale) * (load(a.weight + 4 * i) + a.offset)
            high = (load(x + 4 * i + 64) * scale) * (load(a.weight + 4 * i + 64) + a.offset)
            PUT(low, high, out, a.width, i)


def gated(op, step, thread, num_threads):
    """The product of an activated gate and a value, then the preparation."""
    a = GatedMul.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        x, out = a.x + 8 * a.width * t, a.out + ROW_BYTES(a.width) * t
        for i in range(0, a.width, 32):
            gate, up = x + 4 * i, x + 4 * (a.width + i)
            PUT(GATE(load(gate), load(up)), GATE(load(gate + 64), load(up + 64)), out, a.width, i)


QUANTIZED = dict(PUT=store_q8, ROW_BYTES=q8_bytes)
ROUNDED = dict(PUT=store_rounded, ROW_BYTES=bf16_bytes)
quantize_q8 = variant(plain, "quantize_q8", **QUANTIZED, ONE_THREAD=False)
round_to_bf16 = variant(plain, "round_to_bf16", **ROUNDED, ONE_THREAD=False)
CPU = {"quantize_q8": Implementation(quantize_q8), "round_bf16": Implementation(round_to_bf16)}
PER_TOKEN = {}  # of fused ops: one token after another on one thread
_fused = {"rms_norm": (normed, {})} | {f"{name}_mul": (gated, dict(GATE=gate)) for name, gate in GATES.items()}
for _first, (_body, _gate) in _fused.items():
    for _then, _constants in (("quantize_q8", QUANTIZED), ("round_bf16", ROUNDED)):
        for _table, _one_thread, _suffix in ((CPU, False, ""), (PER_TOKEN, True, "_per_token")):
            _kernel = f"{_first}_{_then}{_suffix}"
            globals()[_kernel] = variant(_body, _kernel, **_constants, **_gate, ONE_THREAD=_one_thread)
            _table[f"{_first}+{_then}"] = Implementation(globals()[_kernel])
