"""Instructions of the inner loops of linear tiles, counted in the assembly that LLVM makes for CPUs that are not here.

    python -m tests.native.tile_counts [--formats q8_0,q4_k] [--cpus neoverse-n1,znver4] [--rows 1,8,512]

prints a table each of instructions, of those that multiply, and of bytes that are loaded, for 32 values of K of one row
and one feature, and of instructions in a turn of the loops that touch the stack: registers that were spilled. A cell
has a number for each number of rows; what is counted is the tile that this many rows are computed by. Counted, not
measured: an instruction is no unit of time.
"""

import argparse
import re
from collections.abc import Iterator
from typing import NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir

from lockstep.formats import FORMATS
from lockstep.formats.parts.tiles import Ahead, Output, Panels, Rows, Use
from lockstep.native import targets
from lockstep.native.simd import I64
from lockstep.ops.linear import linear_cpu
from lockstep.ops.linear.tile import emit_tile
from tests.native.assembly import TRIPLE as ARM

X86 = "x86_64-unknown-linux-gnu"
CPUS = {"znver4": X86, "haswell": X86, "neoverse-n1": ARM, "neoverse-v2": ARM, "apple-m1": ARM, "apple-m4": ARM}
BLOCK = 32  # values of K
MULTIPLY = re.compile(r"v?(pdpbusd|pmaddubsw|dpbf16ps|fn?madd\w+|sdot|smmla|fmla)")
STACK = re.compile(r"\[sp\b|\(%rsp|\(%rbp")
SIZES = {"half": 2, "float": 4, "double": 8, "bfloat": 2}


class Counted(NamedTuple):
    """Of a loop: instructions of a turn, those that multiply, those that touch the stack, bytes loaded."""

    instructions: int
    products: int
    spills: int
    bytes: int


def shape(format, target: targets.Target, num_rows: int) -> tuple[int, int, Use]:
    """Rows, panels and use of the (first) tile that num_rows rows are computed by, or, where it unpacks codes, of the
    second."""
    few, _, most, panels = linear_cpu.shapes_of(format, target)
    rows = linear_cpu.tile_rows.py_func
    unpacks = format.unpacked_on(target) > 0
    if num_rows <= (2 * (most if panels == 1 else few) if unpacks else few):
        return rows(num_rows, few), 1, Use.OWN
    return rows(num_rows, most), panels, Use.READ if unpacks else Use.OWN


def module(format, magic: tuple[str, str, str], height: int, panels: int, use: Use = Use.OWN) -> str:
    """A function that is one tile, as LLVM's text.

    Its arguments: the fields of `Rows`, the first five of `Panels`, where out begins, bytes from one of its rows to the
    next, and where codes are unpacked to, which only some uses read.
    """
    made = ir.Module()
    made.triple = magic[0]
    function = ir.Function(made, ir.FunctionType(ir.VoidType(), [I64] * 10), "tile")
    b, values = ir.IRBuilder(function.append_basic_block()), list(function.args)
    zero, count = ir.Constant(I64, 0), ir.Constant(I64, panels)
    operands = (
        Rows(*values[:2]),
        Panels(*values[2:7], values[9]),
        Output(*values[7:9], zero, zero, count, zero, ir.Constant(I64, 1)),
        Ahead(*values[2:6], ir.Constant(I64, (1 << panels) - 1)),
    )
    emit_tile(format.tile, b, magic, format.name, height, range(panels), operands, use=use)
    b.ret_void()
    return str(made)


def optimised_module(text: str, magic: tuple[str, str, str]) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """A module after LLVM's passes, and the CPU's code generator. Numba runs the same passes, and one more: loops of a
    few instructions, which are those of formats without codes, are unrolled."""
    machine = llvm.Target.from_triple(magic[0]).create_target_machine(cpu=magic[1], opt=3)
    parsed = llvm.parse_assembly(text)
    parsed.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return parsed, machine


def optimised(text: str, magic: tuple[str, str, str]) -> tuple[str, str]:
    """A module after LLVM's passes, and its assembly."""
    parsed, machine = optimised_module(text, magic)
    return str(parsed), machine.emit_assembly(parsed)


def loops(lines: list[str], label: str, jumps: str) -> Iterator[list[str]]:
    """The innermost loops, from a label to the last jump back to it. label, jumps: patterns with the label's name."""
    starts, ends = {}, {}
    for n, line in enumerate(lines):
        if found := re.match(label, line):
            starts[found[1]] = n
        for name in re.findall(jumps, line):
            if name in starts:
                ends[starts[name]] = n
    for first, last in ends.items():
        if not any(first < other <= last for other in ends):
            yield lines[first + 1 : last + 1]


def loaded_bytes(line: str) -> int:
    """What an instruction of LLVM's text loads."""
    found = re.match(r"\s+%\S+ = load (?:<(\d+) x (\w+)>|(\w+)),", line)
    if not found:
        return 0
    kind = found[2] or found[3]
    return int(found[1] or 1) * (SIZES.get(kind) or int(kind[1:]) // 8)


def counted(text: str, assembly: str) -> Counted:
    """The sums over the innermost loops of a tile: one, or several where its columns take turns."""
    jump = r"^\s+(?:j\w+|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.L\w+)"
    asm = [line for body in loops(assembly.splitlines(), r"^(\.LBB\w+):", jump) for line in body]
    code = [line.split() for line in asm if re.match(r"\t[a-z]", line)]
    blocks = loops(text.splitlines(), r"^([\w.]+):", r"label %([\w.]+)")
    return Counted(
        len(code),
        sum(bool(MULTIPLY.match(words[0])) for words in code),
        sum(bool(STACK.search(" ".join(words))) for words in code),
        sum(loaded_bytes(line) for body in blocks for line in body),
    )


def tile(format, cpu: str, num_rows: int) -> tuple[float, float, float, int]:
    """Instructions, those that multiply and bytes, for `BLOCK` values of K of a row and a feature; and instructions of
    a turn that touch the stack."""
    magic = CPUS[cpu], cpu, ""
    height, panels, use = shape(format, targets.of(magic), num_rows)
    found = counted(*optimised(module(format, magic, height, panels, use), magic))
    turn = BLOCK if format.is_quantized else format.packed.size
    times = BLOCK / (turn * height * 16 * panels)
    return found.instructions * times, found.products * times, found.bytes * times, found.spills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--cpus", default=",".join(CPUS))
    parser.add_argument("--rows", default="1,8,512")
    chosen = parser.parse_args()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    formats, cpus, rows = chosen.formats.split(","), chosen.cpus.split(","), [int(n) for n in chosen.rows.split(",")]
    found = {(f, c): list(zip(*(tile(FORMATS[f], c, n) for n in rows), strict=True)) for f in formats for c in cpus}
    for n, what in enumerate(("instructions", "that multiply", "bytes loaded", "on the stack, in a turn")):
        print(f"\n| {what}, {chosen.rows} rows | {' | '.join(cpus)} |\n|{'---|' * (len(cpus) + 1)}")
        for f in formats:
            cells = (", ".join(str(v) if n == 3 else f"{v:.3g}" for v in found[f, c][n]) for c in cpus)
            print(f"| {f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
