"""`python -m tests.resume --points 20000`: answers that go on from random places, on another engine, beside other
requests, with drafts of every kind and without, against the same answers without an interruption. Differences are
printed with their seed, which `--seed` repeats."""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from lockstep.ops.attention.kv_cache import KV_DTYPES
from tests.budget import used_seconds
from tests.promise.models import CONFIGS
from tests.resume.proof import Whole, lots, run_lot, with_stops
from tests.speculation.subjects import Subject, bundled, tiny
from tests.speculation.wishes import wishes

NUM_WISHES, NUM_LOTS, LOT_SIZE = 80, 20, 60


def main() -> int:
    """Runs what the command line asks for; returns 1 if anything differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.resume", description=__doc__)
    parser.add_argument("--points", type=int, default=20_000, help="how many, at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**9, help="of the first answers (the time)")
    parser.add_argument("--model", choices=["bundled", *CONFIGS], default="bundled", help="or a tiny random one")
    parser.add_argument("--kv-dtype", default="bf16", choices=KV_DTYPES, help="of the KV cache (%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model"
        is_bundled = given.model == "bundled"
        formats = dict(kv_dtype=given.kv_dtype)
        subject = with_stops(bundled(**formats)) if is_bundled else tiny(given.model, made, **formats)
        try:
            return campaign(subject, given.seed, given.points, Path(folder))
        finally:
            subject.close()


def campaign(subject: Subject, seed: int, num_points: int, folder: Path) -> int:
    """Resumes answers of one set of wishes after another until num_points samples were resumed."""
    counts, num_different = Counter(), 0
    while counts["points"] < num_points:
        whole, before = Whole(subject, wishes(subject, seed, NUM_WISHES)), counts["points"]
        found = []
        for lot in lots(whole, seed, NUM_LOTS, LOT_SIZE):
            report = run_lot(whole, lot, folder / str(lot.seed))
            found += report.differences
            counts += report.events
        num_different += len(found)
        print(f"seed {seed}: {counts['points'] - before} points, {len(found)} differences", flush=True)
        for difference in found[:20]:
            print("   ", difference[:1000], flush=True)
        seed += 1
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())), flush=True)
    print(f"{num_different} differences in {used_seconds():.0f} CPU seconds", flush=True)
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
