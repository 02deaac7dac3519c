"""Tiles for ARM's SMMLA, with general instructions in place of ARM's, on this machine: equal to the definition.

Rows in pairs and one alone; panels whose bytes hold codes of two features, packed in pieces that end between these.
"""

import contextlib
import ctypes
from dataclasses import replace

import llvmlite.binding as llvm
import numpy as np
import pytest

from lockstep.formats import FORMATS
from lockstep.formats.format import LINE_BYTES
from lockstep.formats.pack import pack
from lockstep.formats.parts.tiles import Use
from lockstep.native import targets
from lockstep.native.isa import rows_in_pairs
from lockstep.native.kernel import target
from lockstep.ops.linear import linear
from lockstep.runtime.executor import aligned
from lockstep.runtime.program import Weight
from tests.native.tile_counts import module
from tests.ops import variants
from tests.ops.harness import same_bits
from tests.ops.linear.test_linear import narrow, prepared, run, stored
from tests.targets import packing_for

# a format for each arrangement of codes, and each function of the loops
FORMATS_TRIED = ["q8_0", "q5_k", "q3_k", "q6_k"]


@pytest.fixture
def pretended(monkeypatch):
    """This machine as a target with SMMLA."""
    made = replace(variants.TARGETS["i8mm"], machine=targets.ISA)
    for name, function in variants.SPELT_OUT.items():
        monkeypatch.setattr(rows_in_pairs, name, function)
    monkeypatch.setattr(targets, "of", lambda magic: made)
    with packing_for(made):
        yield


@contextlib.contextmanager
def running(text):
    """The function of a module of `tile_counts.module`, on this machine."""
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=target()[1], features=target()[2])
    with llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine) as engine:
        engine.finalize_object()
        yield ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)(engine.get_function_address("tile"))


@pytest.mark.parametrize("name", FORMATS_TRIED)
def test_tiles_of_pairs_equal_the_definition(name, pretended):
    format, K, height = FORMATS[name], narrow(name), 3
    parts = [stored(name, 21, K, "a"), stored(name, 11, K, "b")]
    x = np.random.default_rng(0).standard_normal((height, K)).astype(np.float32)
    expected = run(linear.REFERENCE, name, x, parts)
    rows, packed = prepared(name, x), pack(format, Weight("w", name, (32, K), tuple(parts)))
    codes, scales = (*packed, np.zeros((2, 0), np.uint8))[:2]
    panels = codes.ctypes.data, codes.strides[0], scales.ctypes.data, scales.strides[0], K
    num_vectors = format.unpacked_on(targets.of(target()))
    unpacked = aligned(LINE_BYTES * num_vectors * 2 * K // 32)
    for use in (Use.WRITE, Use.READ) if num_vectors else (Use.OWN,):
        out = np.full((height, 32), np.nan, np.float32)
        with running(module(format, target(), height, 2, use)) as tile:
            arrays = rows.ctypes.data, rows.strides[0], *panels, out.ctypes.data, out.strides[0]
            tile(*arrays, unpacked.ctypes.data)
        same_bits(out, expected)
