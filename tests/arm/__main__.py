"""The bits of an emulated ARM machine: make test-arm.

    python -m tests.arm FOLDER [PART...] [--probes N] [--seed S]

FOLDER is a machine of tests/arm/environment.py. A part runs on this machine first, which says what is right and which
kernels are needed; this machine compiles them for ARM (see `compiler`), and the emulated one runs them. Kernels stay in
FOLDER/cache, so that a second run compiles none. The order of memory cannot be seen this way: QEMU orders the accesses
of ARM threads as x86 does.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lockstep.formats import FORMATS
from tests.arm.golden import SEED
from tests.arm.machine import Machine, here, printed

# parts that print digests, which are compared with what this machine prints; from which word on
COMPARED = {
    "parity": (["-m", "lockstep", "parity", "--length", "20", "--threads", "2", "--json"], 0),
    "linear": (["-m", "tests.ops.linear.linear_target", "native", *FORMATS], 0),
    "isa": (["-m", "tests.promise.isa"], 1),  # after the CPU's name
}
FLUSH_TESTS = "flushes_denormals or rounds_before or denormal_products or rounded_before"
WITH_FLUSHES = ["tests/ops/linear/test_linear.py", "tests/ops/attention/test_attention.py"]
FLUSH = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", FLUSH_TESTS, *WITH_FLUSHES]
GOLDEN = ["-m", "tests.arm.golden"]
# kernels that both machines compile: with SDOT, with flushing by ARM's rule, with neither
TWICE = ["cpu:linear_q6_k", "cpu:linear_bf16", "cpu:rms_norm"]


def at_least_one(text: str) -> int:
    """A number of probes. ValueError for none."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def differences(expected: list[str], found: list[str]) -> list[str]:
    """The lines that say what differs."""
    if len(expected) != len(found):
        return [f"{len(expected)} words here, {len(found)} on ARM"]
    return [f"{e} here, {f} on ARM" for e, f in zip(expected, found, strict=True) if e != f]


def compared(part: str, arm: Machine) -> list[str]:
    """Runs a part that prints digests on both machines. Returns what is wrong, line by line, as the others do."""
    arguments, first = COMPARED[part]
    expected, ops = here(arguments)
    prepare(arm, ops)
    return differences(expected[first:], arm.words(arguments)[first:])


def flush(arm: Machine) -> list[str]:
    """Runs tests on both machines."""
    prepare(arm, here(FLUSH)[1])
    return [] if arm.run(FLUSH) else ["tests fail on ARM"]


def golden(arm: Machine, options: list[str]) -> list[str]:
    """Compares the chosen probes' digests; this machine says which these are, since that takes long there."""
    names, ops = json.loads(printed([sys.executable, *GOLDEN, *options, "--plan"]))
    print(f"    {len(names)} probes, {' '.join(options)}", flush=True)
    prepare(arm, ops)
    return [] if arm.run([*GOLDEN, *names]) else ["not all digests were equal"]


def compiler(arm: Machine) -> list[str]:
    """Compares machine code for ARM that this machine makes with what the emulated one makes."""
    return differences(arm.digests(TWICE, arm.compiler), arm.digests(TWICE, arm.python))


def prepare(arm: Machine, ops: list[str]) -> None:
    """Compiles the kernels that are missing, and says how long that took."""
    start = os.times()
    arm.compile(ops)
    print(f"    kernels of {len(ops)} ops: {took(start)}", flush=True)


def took(start: os.times_result) -> str:
    """How long it has been, and how long a processor worked: of a busy machine that says more."""
    times = os.times()
    busy = times.children_user + times.children_system - start.children_user - start.children_system
    return f"{times.elapsed - start.elapsed:.0f} s, {busy:.0f} s of a processor"


def main() -> None:
    """Runs parts, all if none is named. Exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.arm")
    parser.add_argument("folder", type=Path, help="of the emulated machine")
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--probes", type=at_least_one, help="golden: only that many, those with the most kernels first")
    parser.add_argument("--seed", type=int, default=SEED, help=f"golden: for the order of the others ({SEED})")
    given = parser.parse_args()
    options = [f"--{name}={value}" for name in ("probes", "seed") if (value := getattr(given, name))]
    parts: dict[str, Callable[[Machine], list[str]]] = {
        "compiler": compiler,
        **{part: lambda arm, part=part: compared(part, arm) for part in COMPARED},
        "flush": flush,
        "golden": lambda arm: golden(arm, options),
    }
    if unknown := sorted(set(given.parts) - set(parts)):
        parser.error(f"no such part: {unknown[0]}; there are {', '.join(parts)}")
    arm, all_right = Machine(given.folder.resolve()), True
    for part in given.parts or parts:
        start = os.times()
        try:
            wrong = parts[part](arm)
        except subprocess.CalledProcessError as failed:
            wrong = [str(failed)]
        print(f"{part}: {'WRONG' if wrong else 'right'}, {took(start)}", flush=True)
        print("".join(f"    {line}\n" for line in wrong), end="", flush=True)
        all_right = all_right and not wrong
    sys.exit(0 if all_right else 1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
    sys.exit(130)  # as a shell says of SIGINT
