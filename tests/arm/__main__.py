"""The bits of an emulated ARM machine: make test-arm.

    python -m tests.arm FOLDER [PART...]

FOLDER is a machine of tests/arm/environment.py. Kernels stay in FOLDER/cache, so that a second run compiles none. The
order of memory cannot be seen this way: QEMU orders the accesses of ARM threads as x86 does.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from lockstep.formats import FORMATS

ROOT = Path(__file__).parents[2]
# parts that print digests, which are compared with what this machine prints; from which word on
COMPARED = {
    "parity": (["-m", "lockstep", "parity", "--length", "20", "--threads", "2", "--json"], 0),
    "linear": (["-m", "tests.ops.linear.linear_target", "native", *FORMATS], 0),
    "isa": (["-m", "tests.promise.isa"], 1),  # after the CPU's name
}
# parts that judge by themselves
FLUSH_TESTS = "flushes_denormals or rounds_before or denormal_products or rounded_before"
WITH_FLUSHES = ["tests/ops/linear/test_linear.py", "tests/ops/attention/test_attention.py"]
JUDGED = {
    "flush": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", FLUSH_TESTS, *WITH_FLUSHES],
    "golden": ["-m", "tests.arm.golden"],
}


def words(python: list[str], part: str, cache: dict[str, str]) -> list[str]:
    """What a part prints from its first digest on. CalledProcessError where it fails."""
    arguments, first = COMPARED[part]
    made = subprocess.run([*python, *arguments], cwd=ROOT, env=os.environ | cache, stdout=subprocess.PIPE, check=True)
    return made.stdout.decode().split()[first:]


def is_right(folder: Path, part: str) -> bool:
    """Runs a part on the emulated machine, and says how long that took and whether its bits are right."""
    # one core: helper processes take as long to start there as a kernel takes to compile
    arm = ["taskset", "-c", str(min(os.sched_getaffinity(0))), str(folder / "python")]
    cache, start, told = {"LOCKSTEP_CACHE": str(folder / "cache")}, time.monotonic(), ""
    if part in JUDGED:
        right = subprocess.run([*arm, *JUDGED[part]], cwd=ROOT, env=os.environ | cache, check=False).returncode == 0
        seconds = time.monotonic() - start
    else:
        found, seconds = words(arm, part, cache), time.monotonic() - start
        expected = words([sys.executable], part, {})
        right = found == expected
        told = "".join(f"\n    {e} here, {f} on ARM" for e, f in zip(expected, found, strict=False) if e != f)
    print(f"{part}: {'right' if right else 'WRONG'}, {seconds:.0f} s{told}", flush=True)
    return right


def main() -> None:
    folder, *parts = sys.argv[1:]
    every = [*COMPARED, *JUDGED]
    if unknown := sorted(set(parts) - set(every)):
        raise SystemExit(f"no such part: {unknown[0]}; there are {', '.join(every)}")
    results = [is_right(Path(folder).resolve(), part) for part in parts or every]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
