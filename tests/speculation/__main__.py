"""`make speculation`: compares random short requests with drafts of every kind with the same requests without drafts:
`python -m tests.speculation --requests 10000`. Differences are printed with their seed, which `--seed` repeats."""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from lockstep.new_files import scratch_folder
from lockstep.ops.attention.kv_cache import KV_DTYPES
from tests.budget import used_seconds
from tests.promise.models import CONFIGS
from tests.speculation.proof import Menu, Report, lots, run_lot
from tests.speculation.subjects import Subject, bundled, tiny
from tests.speculation.wishes import wishes

NUM_WISHES, LOT_SIZE = 60, 10
FORMATS = ("f32", "bf16", "q8_0", "q4_0")
TOLD = ("requests", "drafts", "right drafts", "preempted requests", "cancelled", "prefix hits", "disk_loaded", "stop")


def prove(subject: Subject, seed: int, folder: Path) -> Report:
    """Runs one Menu, and lots of every source and number of drafts."""
    menu, report = Menu(subject, wishes(subject, seed, NUM_WISHES)), Report()
    for lot in lots(menu, seed, LOT_SIZE):
        of_lot = run_lot(menu, lot, folder)
        report.differences += of_lot.differences
        report.events += of_lot.events
    return report


def main() -> int:
    """Runs what the command line asks for; returns 1 if anything differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.speculation", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="how many, at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**9, help="of the first menu (the time)")
    parser.add_argument("--model", choices=["bundled", *CONFIGS], default="bundled", help="or a tiny random one")
    parser.add_argument(
        "--weights", default="auto", choices=["auto", "f32", "bf16", "q8_0", "q4_0"], help="their format"
    )
    parser.add_argument("--kv-dtype", default="bf16", choices=KV_DTYPES, help="of the KV cache (%(default)s)")
    given = parser.parse_args()
    with scratch_folder() as folder:
        formats = given.weights, given.kv_dtype
        made = folder / "model"
        subject = bundled(*formats) if given.model == "bundled" else tiny(given.model, made, *formats)
        try:
            return campaign(subject, given.seed, given.requests, folder)
        finally:
            subject.close()


def campaign(subject: Subject, seed: int, num_requests: int, folder: Path) -> int:
    """Runs menu after menu until num_requests requests were compared; prints a line for each menu."""
    events, num_different = Counter(), 0
    while events["requests"] < num_requests:
        report = prove(subject, seed, folder / str(seed))
        events += report.events
        num_different += len(report.differences)
        print(f"seed {seed}: {report.events['requests']} requests, {len(report.differences)} differences", flush=True)
        for difference in report.differences[:20]:
            print("   ", difference[:1000], flush=True)
        seed += 1
    print(", ".join(f"{name}: {events[name]}" for name in TOLD), flush=True)
    print("rejected at " + ", ".join(f"{name[12:]}: {events[name]}" for name in sorted_by_place(events)), flush=True)
    print(f"{num_different} differences in {used_seconds():.0f} CPU seconds", flush=True)
    return int(num_different > 0)


def sorted_by_place(events: Counter[str]) -> list[str]:
    """Names of the events that count wrong drafts, in order of their place."""
    return sorted((name for name in events if name.startswith("rejected at ")), key=lambda name: int(name[12:]))


if __name__ == "__main__":
    sys.exit(main())
