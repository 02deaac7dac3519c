"""Instructions of tiles: what multiplies on each CPU, and how they are counted."""

import llvmlite.binding as llvm
import pytest

from lockstep.formats import FORMATS
from tests.native.tile_counts import counted, loaded_bytes, loops, tile

LLVM = """
outer:
  %z = load i64, ptr %p, align 8
  br label %loop
loop:
  %a = load <16 x i8>, ptr %p, align 1
  %b = load float, ptr %q, align 4
  br i1 %c, label %loop, label %done
done:
  br i1 %c, label %outer, label %end
end:
"""
ASSEMBLY = """
.LBB0_1:
\tldr\tq0, [x1]
.LBB0_2:
\tsdot\tv0.4s, v1.16b, v2.16b
\tstr\tq0, [sp, #16]
\tsubs\tx0, x0, #1
\tb.ne\t.LBB0_2
\tcbnz\tx2, .LBB0_1
\tret
"""


def test_the_innermost_loop_is_counted():
    assert counted(LLVM, ASSEMBLY) == (4, 1, 1, 20)
    assert [len(body) for body in loops(["a:", "x", "b:", "y", "to b", "to a"], r"^(\w):", r"to (\w)")] == [2]
    assert loaded_bytes("  %v = load <8 x half>, ptr %p, align 2") == 16


@pytest.mark.parametrize(
    "cpu, rows, products",
    [
        ("znver4", 8, 8 / 16),  # a dot of four bytes for each of sixteen lanes
        ("neoverse-n1", 6, 8 / 4),
        ("neoverse-v2", 6, 4 / 4),  # SMMLA has eight bytes of four pairs of row and feature
        ("apple-m4", 1, 8 / 4),  # a row alone has SDOT
    ],
)
def test_each_cpu_multiplies_with_its_own_instruction(cpu, rows, products):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    instructions, multiplying, loaded, spilled = tile(FORMATS["q8_0"], cpu, rows)
    scaling = 1 / {"znver4": 16}.get(cpu, 4)  # an FMA
    assert multiplying == products + scaling and instructions < 3 * (multiplying + 0.5) and loaded < 40
    assert spilled < 25
