"""Inputs of a token that each layer has for itself: the fast kernels. Bound by memory: two reads and one write of four
bytes for each value."""

from lockstep.native.kernel import variant
from lockstep.native.simd import fma, load, store
from lockstep.ops.elementwise.gates.gelu import gelu_tanh_gate
from lockstep.ops.elementwise.rms_norm_cpu import inverse_rms
from lockstep.ops.linear.per_layer import PerLayerGate, PerLayerInputs
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

ONE_THREAD = None  # constant of a variant: whether one thread does all rows


def norm_runs(op, step, thread, num_threads):
    """The runs of all rows, which lie end to end, are dealt to threads in turn."""
    a = PerLayerInputs.read(op)
    size = 4 * a.width
    for run in strided(num_rows(op, step) * a.num_layers, thread, num_threads, ONE_THREAD):
        x, embedded, out = a.x + size * run, a.embedded + size * run, a.out + size * run
        scale = inverse_rms(x, a.width, a.eps)
        for i in range(0, size, 64):
            store(out + i, fma(load(x + i) * scale, load(a.weight + i), load(embedded + i)))


def gate_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = PerLayerGate.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        gate, out = a.gate + 4 * a.width * t, a.out + 4 * a.width * t
        values = a.values + 4 * (a.values_width * t + a.column)
        for i in range(0, 4 * a.width, 64):
            store(out + i, gelu_tanh_gate(load(gate + i), load(values + i)))


CPU, PER_TOKEN = {}, {}
for _name, _body in (("per_layer_inputs", norm_runs), ("per_layer_gate", gate_rows)):
    for _table, _one_thread, _suffix in ((CPU, False, ""), (PER_TOKEN, True, "_per_token")):
        globals()[_name + _suffix] = variant(_body, _name + _suffix, ONE_THREAD=_one_thread)
        _table[_name] = Implementation(globals()[_name + _suffix])
