"""What kernels ask of a target: a CPU, as the instructions that they are made of see it.

A `Target` is a value. The file that ends with it holds what its instructions do; targets that differ in little share a
file. `lockstep.native.isa` chooses the first that a CPU fits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from lockstep.native.emit import rounded_bytes
from lockstep.native.isa import dots


class Cpu(NamedTuple):
    """What kernels are compiled for (not the host), as LLVM names it. features: as "+avx2,-sse4a"; "" if none is known:
    then the name says what the CPU has."""

    triple: str
    name: str
    features: str

    def is_a(self, *architectures: str) -> bool:
        return self.triple.startswith(architectures)

    def has(self, feature: str, names: tuple[str, ...], lists_all: bool = True) -> bool:
        """Whether the CPU has a feature: as it is listed, or as one of the names, or their beginnings, says.

        lists_all: whether a list of features, if there is one, holds all that the CPU has.
        """
        listed = self.features.split(",") if self.features else []
        if f"+{feature}" in listed:
            return True
        if listed and (lists_all or f"-{feature}" in listed):
            return False
        return self.name.startswith(names)


@dataclass(frozen=True, eq=False)
class Target:
    """A target. `b` is the LLVM builder, vectors are LLVM's.

    name: of its dots, on which packed weights depend: they are kept under this name. fits: whether a CPU has all
    instructions of the target. machine: the module of its instruction set (x86.py, aarch64.py, other.py).

    lanes, registers: float32 lanes of a register, and how many registers there are. dot_lanes: features of a vector of
    integer sums; it may be two registers.

    dot: acc + the dot of every four bytes, int32 lanes: of unsigned w where `unsigned`, otherwise signed w, and signed
    a. Where `tiles` has loops of its own, they know when it is exact. unsigned: whether int8 weights are packed as
    code + 128. pair_dot: acc + the dot of every two int16; operands may have any type of lanes.

    shuffle: of each sixteen bytes of tables, the entries that the codes 0..15 in the same bytes name, in registers of
    up to shuffle_bytes; None: such a lookup is made of choices. bf16_dot: `formats.bf16.flushed_fma` for pairs of
    bfloat16 held as int32, odd halves first, whatever the control word says; None: made of float32.

    whole_tile: how many rows tiles of many rows of codes have where a panel is several vectors and all tiles of codes
    have whole panels, so that a row's codes are loaded into all lanes once for all vectors; 0: tiles of more than two
    rows take a panel vector after vector, and keep all sums in registers.

    shifts_bytes: whether a shift of bytes is one instruction. rounded_bytes: as `emit.rounded_bytes`.

    tiles: a module with the loops of a tile of codes, as `isa.dots` has them. quad: how the loops of that module get
    four codes of a row. in_order: codes [panels, 16, K] in the order in which panels have them. by_feature(b, lanes,
    g): numbers of the features of a column in the order of the words of group g there.
    """

    name: str
    fits: Callable[[Cpu], bool]
    machine: ModuleType
    lanes: int
    registers: int
    dot: Callable[..., Any]
    pair_dot: Callable[..., Any]
    tiles: ModuleType
    dot_lanes: int = 8
    unsigned: bool = False
    shuffle: Callable[..., Any] | None = None
    shuffle_bytes: int = 16
    bf16_dot: Callable[..., Any] | None = None
    whole_tile: int = 0
    shifts_bytes: bool = False
    rounded_bytes: Callable[..., Any] = rounded_bytes
    quad: Callable[..., Any] = dots.quad
    in_order: Callable[..., Any] = lambda codes: codes
    by_feature: Callable[..., Any] = lambda b, lanes, g: lanes

    @property
    def is_wide(self) -> bool:
        """Whether a register holds sixteen lanes (and there are 32 of them)."""
        return self.lanes == 16

    @property
    def panels(self) -> int:
        """Panels of sixteen features in a tile of many rows: two where registers hold 512 numbers."""
        return max(1, self.lanes * self.registers // 256)
