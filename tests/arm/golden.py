"""Every recorded digest, by this machine's kernels: python -m tests.arm.golden. Exit code 1 if one differs.

A start checks the kernels of one model in this way; this checks all kernels. Probes with the most kernels that no probe
before them has come first, the others in random order: --probes 73 runs all kernels, fewer run most. Ctrl-C ends it
with a summary.
"""

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
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
    model: Callable[[], selfcheck_sampling.ProbeModel]

    def kinds(self) -> set[str]:
        """The kinds of its ops."""
        return {op.kind for op in self.model().program.ops}


def every_probe() -> dict[str, Tried]:
    """All probes by name."""
    of_models = {
        str(p): Tried(partial(check.digests, p, CPU), partial(check.probe_model, p, CPU, True)) for p in all_probes()
    }
    of_ops = {
        str(p): Tried(partial(selfcheck_ops.digests, p, CPU), partial(selfcheck_ops.probe_model, p, CPU, True))
        for p in selfcheck_ops.all_probes()
    }
    sampling = Tried(partial(selfcheck_sampling.digests, CPU), partial(selfcheck_sampling.probe_model, CPU))
    return of_models | of_ops | {selfcheck_sampling.NAME: sampling}


def in_order(kinds: dict[str, set[str]], seed: int) -> list[str]:
    """The names of probes, those with the most new kernels first, and then in an order that a seed decides. kinds: of
    their ops, by name."""
    kernels = {name: {CPU[kind].kernel.path for kind in of_probe} for name, of_probe in kinds.items()}
    first: list[str] = []
    left = set().union(*kernels.values())
    while left:
        first.append(max(kernels, key=lambda name: len(left & kernels[name])))
        left -= kernels[first[-1]]
    others = [name for name in kinds if name not in first]
    random.Random(seed).shuffle(others)
    return first + others


def plan(probes: dict[str, Tried], num_probes: int | None, seed: int) -> tuple[list[str], list[str]]:
    """The names of the first probes in order, and their ops, BACKEND:OP."""
    kinds = {name: tried.kinds() for name, tried in probes.items()}
    names = in_order(kinds, seed)[:num_probes]
    return names, sorted(f"cpu:{kind}" for kind in set().union(*(kinds[name] for name in names)))


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
    print(f"{equal:,} of {compared:,} digests and {right} of {done} probes are equal, of {total} chosen", flush=True)
    return right == done == total


def chosen(probes: dict[str, Tried], patterns: Sequence[str]) -> list[str]:
    """The names that patterns mean, in their order. SystemExit for one that means none."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in probes if fnmatch(name, pattern)]
        if not names:
            raise SystemExit(f"no such probe: {pattern!r}; names are those of {golden.PATH.name}")
        found |= dict.fromkeys(names)
    return list(found)


def main() -> None:
    """Compares chosen probes in the order in which they are given, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.arm.golden")
    parser.add_argument("names", nargs="*", metavar="NAME", help='of probes, with * for any letters: "gemma4 *"')
    parser.add_argument("--probes", type=int, metavar="N", help="without names: only the first N")
    parser.add_argument("--seed", type=int, default=SEED, help=f"without names: for the order of the others ({SEED})")
    parser.add_argument("--plan", action="store_true", help="only print the names and ops, as JSON")
    given, probes = parser.parse_args(), every_probe()
    names, ops = chosen(probes, given.names), []
    if not names:
        names, ops = plan(probes, given.probes, given.seed)
    if given.plan:
        print(json.dumps([names, ops]))
        return
    sys.exit(0 if compare(probes, names) else 1)


if __name__ == "__main__":
    main()
