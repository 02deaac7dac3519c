"""Every recorded digest, by this machine's kernels: python -m tests.arm.golden [PROBE...]. Exit code 1 if one differs.

A start checks the kernels of one model in this way; this checks all kernels.
"""

import sys
import time
from collections.abc import Callable

from lockstep.engine.selfcheck import golden
from lockstep.engine.selfcheck import ops as selfcheck_ops
from lockstep.engine.selfcheck import sampling as selfcheck_sampling
from lockstep.engine.selfcheck.check import digests
from lockstep.ops import BACKENDS
from tests.golden.record_kernels import all_probes

CPU = BACKENDS["cpu"]


def every_probe() -> dict[str, Callable[[], list]]:
    """By name, functions that give [(op, tensor name, digest)]."""
    found = {str(probe): (lambda probe=probe: digests(probe, CPU)) for probe in all_probes()}
    of_ops = {str(p): (lambda p=p: selfcheck_ops.digests(p, CPU)) for p in selfcheck_ops.all_probes()}
    return found | of_ops | {selfcheck_sampling.NAME: lambda: selfcheck_sampling.digests(CPU)}


def main() -> None:
    probes, recorded = every_probe(), golden.read()
    num_compared, num_wrong, start = 0, 0, time.monotonic()
    for name in sys.argv[1:] or probes:
        found = probes[name]()
        wrong = [tensor for _, tensor, digest in found if recorded[name][tensor] != digest]
        num_compared, num_wrong = num_compared + len(found), num_wrong + len(wrong)
        differing = f"differing: {', '.join(wrong)}" if wrong else "equal"
        print(f"{time.monotonic() - start:.0f} s  {name}: {len(found)} digests, {differing}", flush=True)
    print(f"{num_compared} digests, {num_wrong} differ")
    sys.exit(1 if num_wrong or not num_compared else 0)


if __name__ == "__main__":
    main()
