"""The product of an activated gate and a value: the fast kernels. Bound by memory: two reads and one write of four
bytes per output."""

from lockstep.native.kernel import inlined, variant
from lockstep.native.simd import load, store
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.gates import GATES
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

BLOCK = 512  # outputs that one thread takes at a time
GATE = ONE_THREAD = None  # constants of a variant: one of GATES, and whether one thread does all rows


def multiply_blocks(op, step, thread, num_threads):
    """Blocks of every row are dealt to threads in turn, so that one row alone keeps all of them busy."""
    a = GatedMul.read(op)
    F, num_blocks = a.width, (a.width + BLOCK - 1) // BLOCK
    for task in strided(num_rows(op, step) * num_blocks, thread, num_threads, ONE_THREAD):
        t, first = task // num_blocks, task % num_blocks * BLOCK
        gate, out = a.x + 4 * (2 * F * t + first), a.out + 4 * (F * t + first)
        gate_values(GATE, gate, gate + 4 * F, min(BLOCK, F - first), out)


@inlined
def gate_values(activated, gate, up, num_values, out):
    """num_values products, a multiple of 16, of float32 at addresses gate and up. activated: one of GATES."""
    for i in range(0, 4 * num_values, 64):
        store(out + i, activated(load(gate + i), load(up + i)))


CPU, PER_TOKEN = {}, {}
for _name, _gate in GATES.items():
    for _table, _one_thread, _suffix in ((CPU, False, ""), (PER_TOKEN, True, "_per_token")):
        _kernel = f"{_name}_mul{_suffix}"
        globals()[_kernel] = variant(multiply_blocks, _kernel, GATE=_gate, ONE_THREAD=_one_thread)
        _table[f"{_name}_mul"] = Implementation(globals()[_kernel])
