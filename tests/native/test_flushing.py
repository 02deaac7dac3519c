"""Steps that flush denormals exactly, in every mode of the CPU, against the definition; and what ARM emits for them."""

import numpy as np
import pytest
from llvmlite import ir

from lockstep.formats.bf16 import flushed_fma
from lockstep.native import flushing
from lockstep.native.isa import aarch64, other, x86
from lockstep.native.kernel import definition, native
from lockstep.native.machine import FLUSH, IEEE, float_control, kept_apart, set_float_control
from lockstep.native.simd import I8, emitted, f32x16, load, store
from tests.native.test_isa import counts, of_function

TINY = 2.0**-126
# (x, w, acc), where x * w + acc is at and beside 2**-126 - 2**-151, above which a result is rounded up to 2**-126
WINDOW = [
    (-(2.0**-76), 2.0**-76, TINY),
    (-(2.0**-75), 2.0**-76, TINY),
    (-(2.0**-75) * (1 + 2.0**-7), 2.0**-76, TINY),
    (-(2.0**-75), 2.0**-75, TINY),
    (-(2.0**-100), 2.0**-126, TINY),
    (2.0**-63, 2.0**-63, -(2.0**-126)),
    (2.0**-100, 2.0**-100, 0.0),
    (2.0**-130, 2.0**20, 0.0),
    (1.0, 2.0**-126, 2.0**-130),
    (0.0, 3.0, -0.0),
    (1.5, 1.25, 3.0),
    (np.inf, 1.0, -np.inf),
]
exact_step = emitted(f32x16(f32x16, f32x16, f32x16))(flushing.exact_step)


@native
def stepped(x, w, acc, out):
    kept_apart()
    store(out, exact_step(load(x), load(w), load(acc)))


@native
def in_mode(word, x, w, acc, out):
    before = float_control()
    set_float_control(word)
    stepped(x, w, acc, out)
    set_float_control(before)


@definition
def defined(x, w, acc):
    return flushed_fma(x, w, acc)


@pytest.mark.parametrize("word", [IEEE, FLUSH])
def test_exact_steps_are_the_definition_in_every_mode(word):
    rng = np.random.default_rng(0)
    random = np.ldexp(rng.standard_normal((3, 960)), rng.integers((-70, -70, -130), (-56, -56, -120), (960, 3)).T)
    x, w, acc = np.concatenate([np.array([*WINDOW, *(-np.array(WINDOW))]).T, random], axis=1).astype(np.float32)
    x, w = (np.ascontiguousarray((v.view(np.uint32) & 0xFFFF0000).view(np.float32)) for v in (x, w))
    x, w, acc = (np.pad(v, (0, -v.size % 16)) for v in (x, w, acc))
    out, expected = np.empty_like(x), np.array([defined(*v) for v in zip(x, w, acc, strict=True)], np.float32)
    for i in range(0, x.size, 16):
        in_mode(word, *(v.ctypes.data + 4 * i for v in (x, w, acc, out)))
    assert np.array_equal(out, expected, equal_nan=True) and np.array_equal(np.signbit(out), np.signbit(expected))
    assert ((expected == 0) & (acc != 0)).sum() > 20 and (abs(expected) == np.float32(TINY)).sum() > 5


@pytest.mark.parametrize("isa, steps", [(x86, ["fast"]), (other, ["exact"]), (aarch64, ["fast", "exact"])])
def test_steps_by_the_instruction_set(isa, steps, monkeypatch):
    monkeypatch.setattr(flushing, "ISA", isa)
    b, [place] = of_function(I8.as_pointer())
    v = b.load(b.bitcast(place, f32x16.ir.as_pointer()))
    emitted = []

    def emit(name, step):
        def sums(start):
            emitted.append(name)
            return [step(s, s) for s in start]

        return sums

    [result] = flushing.as_defined(b, [v], emit("fast", b.fadd), emit("exact", b.fmul))
    b.store(result, b.bitcast(place, f32x16.ir.as_pointer()))
    assert emitted == steps and isinstance(result, ir.PhiInstr) == (len(steps) == 2)
    if isa is aarch64:
        found = counts(b)
        assert found["mrs"] == 1 and found["msr"] == 1 and found["fadd"] == found["fmul"] == 4
