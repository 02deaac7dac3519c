"""Kernels are assembled for ARM, on any machine: the dots that they should have, and no line that emits is left out."""

import functools
import json
import subprocess
import sys

import pytest

from lockstep.formats import FORMATS
from tests.native.assembly import libm_of, product_of
from tests.native.covering import CPUS
from tests.native.emitting import statements_of

# Functions of which lines run for other targets only: for x86, for instruction sets without dots, for other systems.
# Whoever adds a line that emits for ARM takes its kernel into covering.py; whoever moves a function moves it here.
OTHERS = """
    formats/bf16.py: _by_pairs _pairs_native
    formats/groups/group8.py: dots_u8
    formats/parts/dots.py: _half_zero_points nibbles
    formats/parts/tables.py: entry_dots
    formats/parts/tiles.py: look_ahead
    native/emit.py: spread4
    native/flushing.py: as_defined
    native/isa/avx2.py: dot pair_dot
    native/isa/dots.py: quad
    native/isa/other.py: _every_fourth barrier dot read_control
    native/isa/saturating.py: _byte_dots_of_rows _byte_dots_read _pairs _signed absolute byte_dots long_dots scaled_dots
    native/isa/saturating.py: sign unpack_bytes unsigned_dots
    native/isa/vnni.py: bf16_dot dot pair_dot
    native/isa/x86.py: barrier maddubs maddwd pair_sums pause read_control rounded_bytes shuffle write_control
    native/lookup.py: _chosen _chosen_own lookup lookup_own
    native/system/darwin.py: sleep_while_equal wake
    native/system/linux.py: sleep_while_equal
    native/system/other.py: sleep_while_equal
    native/tiles_bytes.py: _add_bytes _step.codegen
    native/tiles_pairs.py: _dot_pairs.emit
    ops/linear/tile.py: _end_unless linear_tile.codegen
"""


@functools.cache
def covered(*cpus):
    command = [sys.executable, "-m", "tests.native.covering", *cpus]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="there other lines run for this system, and these do not")
def test_every_line_that_emits_for_arm_is_assembled():
    for_all, for_one = ({tuple(line) for line in covered(*cpus)["missing"]} for cpus in [(), ("neoverse-v2,apple-m4",)])
    left = {(file, function) for file, function, _ in for_all & for_one}
    named = [line.split(":") for line in OTHERS.strip().splitlines()]
    others = {(f"lockstep/{file.strip()}", function) for file, functions in named for function in functions.split()}
    assert left - others == set(), "no kernel of covering.py runs a line of these"
    assert others - left == set(), "all lines of these run by now"


def test_linear_layers_have_their_dots_on_every_arm_cpu():
    products = covered()["products"]
    paths = [path for path in products if product_of(path)]
    assert len(paths) == len(FORMATS) + 2
    for path in paths:
        name = product_of(path)
        assert list(products[path]) == list(CPUS) and all(counts[name] for counts in products[path].values()), path
    assert all(counts["sdot"] for counts in products["tests.native.small_kernels:codes_fixed"].values())


def test_a_call_of_libm_is_seen():
    names = "declare float @expf(float)\ndeclare <4 x float> @llvm.pow.v4f32(<4 x float>)\ndeclare i32 @usleep(i32)"
    assert libm_of(names) == {"expf", "llvm.pow.v4f32"}
    assert not libm_of("declare float @llvm.fma.f32(float)\ndeclare float @llvm.sqrt.f32(float)\ndefine i32 @exp()")


SOURCE = """
def emit(b, x):
    if x:
        return b.add(
            x, x)
    for i in x:
        def inner():
            return i
        b.mul(i, inner())

class Site:
    def next(self):
        self.b.add(1)

def typer(context):
    kind = 1
    def codegen(context, b):
        return b.mul(kind)

def plain(a):
    return a
"""


@pytest.mark.parametrize("ran, left", [([], [3, 4, 6, 8, 9, 13, 18]), ([3, 5, 6, 18], [8, 9, 13])])
def test_statements_that_emit_are_found(ran, left):
    assert [line for _, line in statements_of(SOURCE, set(ran))] == left
