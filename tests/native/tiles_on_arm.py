"""Linear tiles in ARM's machine code, run by QEMU without an ARM Python: the same bits as the definition.

    python -m tests.native.tiles_on_arm --qemu QEMU --binutils FOLDER [--formats q8_0,q4_k] [--cpus CPU=QEMU's]

A tile is compiled here, linked with its operands to a program that writes its output, and run: a second each, where
a kernel that is compiled by an emulated LLVM takes a minute. QEMU: qemu-aarch64, version 7 or newer. FOLDER: where
aarch64-linux-gnu-as and -ld are, of Debian's binutils-aarch64-linux-gnu. Exit code 1 if a tile gives other bits.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np

from lockstep.formats import FORMATS
from lockstep.formats.pack import pack
from lockstep.native import targets
from lockstep.ops.linear import linear
from lockstep.runtime.program import Weight
from tests.native.assembly import TRIPLE
from tests.native.tile_counts import module, optimised_module
from tests.ops.linear.test_linear import narrow, prepared, run, stored
from tests.targets import packing_for

# LLVM's name of a CPU: QEMU's name of one that has its instructions
CPUS = {"cortex-a72": "cortex-a72", "neoverse-n1": "neoverse-n1", "neoverse-n2": "neoverse-n2", "apple-m4": "max"}
HEIGHTS = (1, 2, 3, 6)
FEATURES = 32
# Writes what the tile has stored, and ends.
START = """\
.globl _start
_start:
{arguments}
    bl tile
    mov x0, #1
    ldr x1, =out
    ldr x2, ={size}
    mov x8, #64
    svc #0
    mov x0, #0
    mov x8, #93
    svc #0
.ltorg
.data
{operands}
"""


def program(
    tile: bytes, operands: dict[str, np.ndarray], strides: dict[str, int], folder: Path, binutils: Path
) -> Path:
    """Links the object of a tile with its operands. strides: bytes between rows, or panels; and K."""
    names = ("x", "x_stride", "codes", "codes_stride", "scales", "scales_stride", "K", "out", "out_stride")
    values = [strides.get(name, name) for name in names]
    ninth = f"    ldr x9, ={values[8]}\n    sub sp, sp, #16\n    str x9, [sp]"
    loads = "\n".join([*(f"    ldr x{n}, ={value}" for n, value in enumerate(values[:8])), ninth])
    data = ""
    for name, array in operands.items():
        (folder / name).write_bytes(array.tobytes())
        data += f'.balign 64\n{name}: .incbin "{folder / name}"\n'
    start = START.format(arguments=loads, size=operands["out"].nbytes, operands=data)
    (folder / "start.s").write_text(start)
    (folder / "tile.o").write_bytes(tile)
    tool = lambda name, *words: subprocess.run([binutils / f"aarch64-linux-gnu-{name}", *words], cwd=folder, check=True)
    tool("as", "start.s", "-o", "start.o")
    tool("ld", "start.o", "tile.o", "-o", "program")
    return folder / "program"


def ran(name: str, cpu: str, height: int, options: argparse.Namespace) -> bool:
    """Whether a tile of a format gives the definition's bits on an emulated CPU."""
    format, K, magic = FORMATS[name], narrow(name), (TRIPLE, cpu, "")
    parts = [stored(name, 21, K, "a"), stored(name, 11, K, "b")]
    x = np.random.default_rng(0).standard_normal((height, K)).astype(np.float32)
    expected, rows = run(linear.REFERENCE, name, x, parts), prepared(name, x)
    with packing_for(targets.of(magic)):
        codes, scales = (*pack(format, Weight("w", name, (FEATURES, K), tuple(parts))), np.zeros((2, 16), np.uint8))[:2]
    out = np.zeros((height, FEATURES), np.float32)
    operands = dict(x=rows, codes=codes, scales=scales, out=out)
    strides = {f"{key}_stride": array.strides[0] for key, array in operands.items()} | dict(K=K)
    parsed, machine = optimised_module(module(format, magic, height, 2), magic)
    with tempfile.TemporaryDirectory() as folder:
        linked = program(machine.emit_object(parsed), operands, strides, Path(folder), Path(options.binutils))
        qemu = [options.qemu, "-cpu", CPUS[cpu], linked]
        printed = subprocess.run(qemu, stdout=subprocess.PIPE, check=True).stdout
    return printed == expected.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("qemu", "binutils"):
        parser.add_argument(f"--{name}", required=True)
    quantized = [name for name, format in FORMATS.items() if format.is_quantized]
    parser.add_argument("--formats", default=",".join(quantized))
    parser.add_argument("--cpus", default=",".join(CPUS))
    options = parser.parse_args()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    num_wrong = 0
    for name in options.formats.split(","):
        for cpu in options.cpus.split(","):
            right = {height: ran(name, cpu, height, options) for height in HEIGHTS}
            print(name, cpu, targets.of((TRIPLE, cpu, "")).name, right, flush=True)
            num_wrong += list(right.values()).count(False)
    sys.exit(1 if num_wrong else 0)


if __name__ == "__main__":
    main()
