"""Mutating the bytes of a small valid file and opening it: the only error is ValueError, and little memory is used."""

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

MAX_PEAK_BYTES = 32 << 20


def truncations(content: bytes, path: Path, read: Callable[[Path], object], stop: int) -> None:
    """Every prefix shorter than `stop` bytes must be refused with a ValueError."""
    for length in range(stop):
        path.write_bytes(content[:length])
        try:
            read(path)
        except ValueError:
            continue
        raise AssertionError(f"the first {length} of {len(content)} bytes were accepted")


def mutations(content: bytes, path: Path, read: Callable[[Path], object], rounds: int, seed: int) -> int:
    """Open `rounds` mutants, within MAX_PEAK_BYTES of memory; returns how many were accepted."""
    rng, accepted = random.Random(seed), 0
    tracemalloc.start()
    for _ in range(rounds):
        path.write_bytes(mutant(content, rng))
        try:
            read(path)
            accepted += 1
        except ValueError:
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_PEAK_BYTES, peak
    return accepted


def mutant(content: bytes, rng: random.Random, stop: int | None = None) -> bytes:
    """The content with a few bytes before `stop` changed, removed or added."""
    mutant = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(min(len(mutant), stop or len(mutant)))
        kind = rng.randrange(5)
        if kind == 0:
            mutant[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutant[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord('"'), ord("[")))
        elif kind == 2:
            mutant[at : at + 8] = rng.choice((0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)).to_bytes(
                8, "little"
            )
        elif kind == 3:
            del mutant[at : at + rng.randrange(1, 16)]
        else:
            mutant[at:at] = rng.randbytes(rng.randrange(1, 16))
        if not mutant:
            return b"\0"
    return bytes(mutant)
