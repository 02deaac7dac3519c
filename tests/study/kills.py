"""A study that is killed (SIGKILL) many times gives the same bytes as an undisturbed one: python -m tests.study.kills.

More than 50 trials on the bundled model, by one process or two; the kills come at moments that are spread over
the whole run.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lockstep.new_files import scratch_folder

TEXTS = Path(__file__).parents[2] / "studies" / "texts"
RECIPE = f"""
[calibrate]
text = "{TEXTS / "calibration.txt"}"
windows = 4
length = 128
[evaluate]
text = "{TEXTS / "evaluation.txt"}"
windows = 8
length = 128
round = 4
[plan]
rules = [["*", "i16"], ["*.w", "u8"]]
[[sweep]]
k = {{ sites = "L3.k.all", spec = ["u2", "u4/head"] }}
p = {{ sites = "L3.p", spec = ["u2", "u8"] }}
[[sweep]]
one_at_a_time = {{ sites = "L3.*", spec = "u4" }}
"""
AVX2 = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
FILES = ("trials.jsonl", "rounds.jsonl")


def started(recipe, folder, jobs, env=None):
    command = [sys.executable, "-m", "lockstep", "ptq", "run", str(recipe), "--out", str(folder), "--jobs", str(jobs)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, start_new_session=True, env=env, **quiet)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--arithmetic", choices=("float", "integer"), default="float", help="of all plans")
    parser.add_argument("--avx2", action="store_true", help="one more run, compiled for AVX2 (Haswell)")
    args = parser.parse_args()
    kills = args.kills
    with scratch_folder() as root:
        recipe = root / "recipe.toml"
        recipe.write_text(RECIPE.replace("[plan]", f'[plan]\narithmetic = "{args.arithmetic}"'))
        assert started(recipe, root / "warm", 1).wait() == 0  # compiles what is not compiled yet
        assert started(recipe, root / "whole", 1).wait() == 0
        wanted, folder = contents(root / "whole"), root / "killed"
        size, trials = len(wanted["rounds.jsonl"]), wanted["trials.jsonl"].count(b"\n")
        for i in range(kills):
            process = started(recipe, folder, 1 + i % 2)
            while process.poll() is None and size_of(folder / "rounds.jsonl") < size * i // kills:
                time.sleep(0.001)
            time.sleep(i % 4 * 0.01)  # in the middle of a plan, too
            assert process.poll() is None, "it ended before it was killed"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"kill {i + 1}: {size_of(folder / 'rounds.jsonl')} of {size} bytes of rounds")
        assert started(recipe, folder, 2).wait() == 0
        assert contents(folder) == wanted, "other bytes"
        print(f"{trials} trials, {kills} kills, the same bytes")
        if args.avx2:
            assert started(recipe, root / "avx2", 2, AVX2).wait() == 0
            assert contents(root / "avx2") == wanted, "other bytes with AVX2"
            print("the same bytes with AVX2")


if __name__ == "__main__":
    main()
