"""`make fuzz` and `make attacks`: `python -m tests.fuzz --minutes 60`, `python -m tests.fuzz --attacks`."""

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz.campaign import KINDS, Campaign


def main() -> int:
    """Runs the fuzz or the attacks, as the command line says; returns 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long (%(default)g)")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**9, help="of the inputs; without one the time")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of input")
    parser.add_argument("--at", type=int, help="play only the input of this number, of one kind")
    parser.add_argument("--folder", type=Path, default=Path("fuzz-faults"), help="where inputs that failed are kept")
    parser.add_argument("--attacks", action="store_true", help="play the attacks of tests/fuzz/attacks.py instead")
    given = parser.parse_args()
    if given.attacks:
        from tests.fuzz.attack_run import play_all

        return play_all()
    if given.at is not None and len(given.only) != 1:
        parser.error("--at: say --only KIND, too")
    return Campaign(given.seed, given.only, given.folder, given.at).run(60 * given.minutes)


if __name__ == "__main__":
    sys.exit(main())
