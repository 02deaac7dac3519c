"""Root-mean-square norm: the kernel equals the definition, which is accurate."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise import rms_norm, rms_norm_cpu
from lockstep.ops.elementwise.rms_norm import RmsNorm
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)


def norm(backend, x, w, offset=1.0, num_threads=1):
    numbers = dict(width=x.shape[1], eps=1e-6, offset=offset)
    return run_op(backend, RmsNorm, num_threads=num_threads, out=(x.shape[1], "f32"), x=x, weight=w, **numbers)["out"]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 17])
@pytest.mark.parametrize("width", [16, 64, 1024])
def test_kernel_equals_definition(num_tokens, width):
    x, w = (RNG.standard_normal(s).astype(np.float32) for s in ((num_tokens, width), width))
    same_bits(norm(rms_norm_cpu.CPU, x, w, num_threads=3), norm(rms_norm.REFERENCE, x, w))


def test_definition_compiled_equals_interpreted():
    x, w = (RNG.standard_normal(s).astype(np.float32) for s in ((2, 32), 32))
    outs = [np.empty_like(x), np.empty_like(x)]
    rms_norm.rms_norm(x, w, np.float32(1e-6), np.float32(1), outs[0])
    interpreted(rms_norm.rms_norm)(x, w, np.float32(1e-6), np.float32(1), outs[1])
    same_bits(*outs)


def test_definition_is_accurate():
    x, w = (RNG.standard_normal(s).astype(np.float32) for s in ((4, 1024), 1024))
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * (w + 1.0)
    assert np.abs(norm(rms_norm.REFERENCE, x, w) - exact).max() < 2e-6
    assert np.abs(norm(rms_norm.REFERENCE, x, w, offset=0.0) - exact * w / (w + 1)).max() < 2e-6
