"""Preparation of the input rows of linear layers: the fast kernels, alone and fused with the op that makes the row.

Values are made, some hundreds of a row at a time, and then prepared from the first-level cache: in loops of their own,
so that the processor has several independent values at hand in each, where a loop over both would wait for the chain
of one block. Fused kernels give the bits of the op followed by `quantize_q8` or `round_bf16`.
"""

from lockstep.native.kernel import inlined, variant
from lockstep.native.machine import stack_memory
from lockstep.native.simd import load, round_bf16, store, store_bf16
from lockstep.ops.elementwise.activations import BLOCK, NATIVE_BF16, Preparation, bf16_bytes, q8_bytes
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.gated_mul_cpu import gate_values
from lockstep.ops.elementwise.gates import GATES
from lockstep.ops.elementwise.quantized_blocks import AT_ONCE, quantize_blocks
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.elementwise.rms_norm_cpu import inverse_rms, scaled_row
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

MADE = 512  # values of a row that are made before they are prepared: they stay in the first-level cache
MADE_BYTES = 4 * MADE
# constants of a variant: functions that prepare values, and count bytes of a row; whether one thread does all rows;
# one of GATES
PUT = ROW_BYTES = ONE_THREAD = GATE = None


@inlined
def put_quantized(x, num_values, out):
    """Quantizes num_values float32 at address x, a multiple of 32, to a part of a row at address out."""
    together = num_values // (AT_ONCE * BLOCK) * (AT_ONCE * BLOCK)
    for i in range(0, together, AT_ONCE * BLOCK):
        quantize_blocks(x + 4 * i, out + q8_bytes(i), AT_ONCE)
    for i in range(together, num_values, BLOCK):
        quantize_blocks(x + 4 * i, out + q8_bytes(i), 1)


@inlined
def put_rounded(x, num_values, out):
    """Rounds num_values float32 at address x, a multiple of 16, to bf16."""
    for i in range(0, num_values, 16):
        if NATIVE_BF16:
            store_bf16(out + 2 * i, round_bf16(load(x + 4 * i)))
        else:
            store(out + 4 * i, round_bf16(load(x + 4 * i)))


def plain(op, step, thread, num_threads):
    """Prepares the rows of x."""
    a = Preparation.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        PUT(a.x + 4 * a.width * t, a.width, a.out + ROW_BYTES(a.width) * t)


def normed(op, step, thread, num_threads):
    """`rms_norm`, then the preparation."""
    a, memory = RmsNorm.read(op), stack_memory(MADE_BYTES)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        x, out = a.x + 4 * a.width * t, a.out + ROW_BYTES(a.width) * t
        scale = inverse_rms(x, a.width, a.eps)
        for i in range(0, a.width, MADE):
            num_values = min(MADE, a.width - i)
            scaled_row(x + 4 * i, scale, a.weight + 4 * i, num_values, a.offset, memory)
            PUT(memory, num_values, out + ROW_BYTES(i))


def gated(op, step, thread, num_threads):
    """The product of an activated gate and a value, then the preparation."""
    a, memory = GatedMul.read(op), stack_memory(MADE_BYTES)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        x, out = a.x + 8 * a.width * t, a.out + ROW_BYTES(a.width) * t
        for i in range(0, a.width, MADE):
            num_values = min(MADE, a.width - i)
            gate_values(GATE, x + 4 * i, x + 4 * (a.width + i), num_values, memory)
            PUT(memory, num_values, out + ROW_BYTES(i))


QUANTIZED = dict(PUT=put_quantized, ROW_BYTES=q8_bytes)
ROUNDED = dict(PUT=put_rounded, ROW_BYTES=bf16_bytes)
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
