"""The gated norm of each head: the kernel equals the definition, which is accurate."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.recurrent import gated_norm, gated_norm_cpu
from lockstep.ops.recurrent.gated_norm import GatedNorm
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def norm(backend, o, z, w, offset, num_threads=1, **more):
    where = dict(row_width=z.shape[1], z_offset=offset, num_heads=o.shape[1] // w.size, head_dim=w.size, **more)
    return run_op(backend, GatedNorm, num_threads=num_threads, o=o, z=z, weight=w, eps=1e-6, **where)["out"]


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("num_heads, head_size", [(1, 16), (3, 48), (16, 128)])
def test_kernel_equals_definition(num_tokens, num_heads, head_size):
    width = num_heads * head_size
    o, z, w = floats(num_tokens, width), floats(num_tokens, width + 40), floats(head_size)
    expected = norm(gated_norm.REFERENCE, o, z, w, 24)
    for num_threads in (1, 3):
        same_bits(norm(gated_norm_cpu.CPU, o, z, w, 24, num_threads), expected)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_heads_of_groups_take_turns(groups):
    o, z, w = floats(5, 6 * 32), floats(5, 6 * 32), floats(32)
    plain = norm(gated_norm.REFERENCE, o, z, w, 0).reshape(5, groups, 6 // groups, 32)
    expected = plain.swapaxes(1, 2).reshape(5, -1)
    same_bits(norm(gated_norm.REFERENCE, o, z, w, 0, num_in_turn=groups), expected)
    same_bits(norm(gated_norm_cpu.CPU, o, z, w, 0, 2, num_in_turn=groups), expected)


def test_definition_compiled_equals_interpreted():
    o, z, w = floats(2, 2, 32), floats(2, 70), floats(32)
    outs = [np.empty_like(o), np.empty_like(o)]
    gated_norm.gated_norm(o, z, 5, w, np.float32(1e-6), outs[0])
    interpreted(gated_norm.gated_norm)(o, z, 5, w, np.float32(1e-6), outs[1])
    same_bits(*outs)


def test_definition_is_accurate():
    o, z, w = floats(5, 4 * 128), floats(5, 4 * 128), floats(128)
    heads, gate = o.astype(np.float64).reshape(5, 4, 128), z.astype(np.float64)
    normed = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * w
    exact = normed.reshape(5, -1) * gate / (1 + np.exp(-gate))
    out = norm(gated_norm.REFERENCE, o, z, w, 0)
    assert (np.abs(out - exact) / np.spacing(np.abs(exact).astype(np.float32))).max() < 6
