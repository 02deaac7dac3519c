"""Every recorded digest, by this machine's kernels: python -m tests.arm.golden. Exit code 1 if one differs.

A start checks the kernels of one model in this way; this checks all kernels. Probes with the most kernels that no probe
before them has come first, the others in random order: --probes 73 runs all kernels, fewer run most. Ctrl-C ends it
with a summary.
"""

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

from lockstep.engine.selfcheck import check, golden
from lockstep.engine.selfcheck import ops as selfcheck_ops
from lockstep.engine.selfcheck import sampling as selfcheck_sampling
from lockstep.ops import BACKENDS
from tests.golden.record_kernels import all_probes

CPU = BACKENDS["cpu"]
SEED = 21
Digests = Sequence[tuple[object, str, str]]  # op, tensor name, digest


class Tried(NamedTuple):
    """A probe."""

    digests: Callable[[], Digests]
    kinds: frozenset[str]  # of its ops


def _tried(digests: Callable[[], Digests], model: selfcheck_sampling.ProbeModel) -> Tried:
    return Tried(digests, frozenset(op.kind for op in model.program.ops))


def every_probe() -> dict[str, Tried]:
    """All probes by name."""
    found = {str(p): _tried(lambda p=p: check.digests(p, CPU), check.probe_model(p, CPU, True)) for p in all_probes()}
    for p in selfcheck_ops.all_probes():
        model = selfcheck_ops.probe_model(p, CPU, True)
        found[str(p)] = _tried(lambda p=p: selfcheck_ops.digests(p, CPU), model)
    sampling = _tried(lambda: selfcheck_sampling.digests(CPU), selfcheck_sampling.probe_model(CPU))
    return found | {selfcheck_sampling.NAME: sampling}


def in_order(probes: dict[str, Tried], seed: int) -> list[str]:
    """The names of probes, those with the most new kernels first, and then in an order that a seed decides."""
    kernels = {name: {CPU[kind].kernel.path for kind in tried.kinds} for name, tried in probes.items()}
    first: list[str] = []
    left = set().union(*kernels.values())
    while left:
        first.append(max(kernels, key=lambda name: len(left & kernels[name])))
        left -= kernels[first[-1]]
    others = [name for name in probes if name not in first]
    random.Random(seed).shuffle(others)
    return first + others


def compare(probes: dict[str, Tried], names: Sequence[str]) -> bool:
    """Runs probes, says how each went and at the end how many digests were equal. Returns whether all were."""
    recorded, start, total = golden.read(), time.monotonic(), len(names)
    done, right, equal, compared = 0, 0, 0, 0
    with contextlib.suppress(KeyboardInterrupt):
        for name in names:
            found = probes[name].digests()
            wrong = [tensor for _, tensor, digest in found if recorded[name][tensor] != digest]
            done, right = done + 1, right + (not wrong)
            compared, equal = compared + len(found), equal + len(found) - len(wrong)
            differing = f"DIFFERING: {', '.join(wrong)}" if wrong else "equal"
            told = f"{done} of {total}, {time.monotonic() - start:.0f} s"
            print(f"{told}  {name}: {len(found)} digests, {differing}", flush=True)
    print(f"{equal:,} of {compared:,} digests and {right} of {done} probes are equal, of {len(probes)}", flush=True)
    return right == done == total


def main() -> None:
    """Compares chosen probes, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.arm.golden")
    parser.add_argument("names", nargs="*", metavar="NAME", help='of probes, with * for any letters: "gemma4 *"')
    parser.add_argument("--probes", type=int, metavar="N", help="only the first N")
    parser.add_argument("--seed", type=int, default=SEED, help=f"for the order of the others ({SEED})")
    parser.add_argument("--ops", action="store_true", help="only print their ops, BACKEND:OP")
    arguments = parser.parse_args()
    every = every_probe()
    if unknown := [name for name in arguments.names if not any(fnmatch(probe, name) for probe in every)]:
        parser.error(f"no such probe: {unknown[0]!r}; there are {', '.join(every)}")
    patterns = arguments.names or ["*"]
    probes = {name: tried for name, tried in every.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    names = in_order(probes, arguments.seed)[: arguments.probes]
    if arguments.ops:
        print(*sorted(f"cpu:{kind}" for kind in set().union(*(probes[name].kinds for name in names))))
        return
    print(f"{len(names)} probes, seed {arguments.seed}", flush=True)
    sys.exit(0 if compare(probes, names) else 1)


if __name__ == "__main__":
    main()
