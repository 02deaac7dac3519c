"""Sixteen bytes looked up by codes: the same entries with the instructions of this CPU and of other targets."""

import numpy as np
import pytest
from llvmlite import binding, ir
from numba import int64, njit

from lockstep.native import lookup, targets
from lockstep.native.emit import vector
from lockstep.native.kernel import target
from lockstep.native.simd import I8, load_u8, primitive, read_at, store, write_at

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LOW, HIGH = lookup.words_of(TABLE)
CODES = np.random.default_rng(0).integers(0, 16, 64).astype(np.uint8)
CODES[:16] = np.arange(16)


def looking_up(magic, num_codes):
    """A primitive that looks up num_codes codes with the instructions of a target."""

    @primitive()
    def look_up(context, codes, out):
        def codegen(ctx, b, sig, args):
            found = lookup.lookup(b, magic, lookup.table_of(TABLE), read_at(b, args[0], vector(I8, num_codes)))
            write_at(b, args[1], found)
            return ctx.get_dummy_value()

        return int64(int64, int64), codegen

    return look_up


@pytest.mark.parametrize("num_codes", [16, 32, 64])
@pytest.mark.parametrize("magic", [target(), ("riscv64-unknown-linux", "", "")], ids=["own", "generic"])
def test_every_entry_is_found(magic, num_codes):
    look_up = looking_up(magic, num_codes)

    @njit
    def run(codes, out):
        look_up(codes, out)

    out = np.zeros(num_codes, np.int8)
    run(CODES.ctypes.data, out.ctypes.data)
    assert out.tolist() == [TABLE[code] for code in CODES[:num_codes]]


def test_sixteen_lanes():
    @njit
    def run(codes, low, high, out):
        store(out, lookup.lookup_i8(load_u8(codes), low, high))

    out = np.zeros(16, np.int32)
    run(CODES.ctypes.data, LOW, HIGH, out.ctypes.data)
    assert tuple(out) == TABLE


@pytest.mark.parametrize(
    "magic, instruction",
    [
        (("aarch64-unknown-linux-gnu", "neoverse-n1", ""), "tbl"),
        (("x86_64-unknown-linux-gnu", "haswell", ""), "vpshufb"),
        (("x86_64-unknown-linux-gnu", "znver5", ""), "vpshufb"),
    ],
    ids=["NEON", "AVX2", "AVX-512"],
)
def test_a_register_of_codes_takes_one_instruction(magic, instruction):
    num_codes = {"neoverse-n1": 16, "haswell": 32, "znver5": 64}[magic[1]]
    assert targets.of(magic).shuffle_bytes == num_codes
    module, kind = ir.Module(), vector(I8, num_codes)
    module.triple = magic[0]
    function = ir.Function(module, ir.FunctionType(kind, [kind]), "look_up")
    b = ir.IRBuilder(function.append_basic_block())
    b.ret(lookup.lookup(b, magic, lookup.table_of(TABLE), function.args[0]))
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(magic[0]).create_target_machine(cpu=magic[1], opt=2)
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert assembly.count(instruction) == 1, assembly
