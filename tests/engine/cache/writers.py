"""Processes that fill one folder of the prefix cache and are killed (SIGKILL): python -m tests.engine.cache.writers.

Each writes and reads entries as fast as it can, far more than the folder may hold, and damages one now and then. After
each kill, and at the end: every entry that is read is what was written under its name, the files take no more bytes
than allowed, and the folder's own count of them is not too low.
"""

import argparse
import contextlib
import fcntl
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lockstep.engine.cache import prefix_disk
from lockstep.engine.cache.prefix_disk import DiskStore
from lockstep.engine.cache.shared_folder import ENTRY, LOCK, MAKING, TOTAL
from lockstep.new_files import scratch_folder

SIZES = dict(page=1000, state=5000)
CONTENT = SimpleNamespace(known="c" * 64, wait=lambda **_: "c" * 64)
MAX_BYTES, NUM_NAMES = 100_000, 200  # all entries together would take about 600,000 bytes


def data_of(kind: str, number: int) -> np.ndarray:
    return np.random.RandomState(number).randint(0, 256, SIZES[kind]).astype(np.uint8)


def opened(folder: Path) -> DiskStore:
    prefix_disk.LOOK_SECONDS = 0
    return DiskStore(folder, MAX_BYTES, SIZES, CONTENT)


def check_read(store: DiskStore, kind: str, number: int) -> bool:
    """Whether an entry is there; AssertionError if it is not what was written under its name."""
    data = store.load(kind, number.to_bytes(32, "big"))
    assert data is None or data.tolist() == data_of(kind, number).tolist(), (kind, number)
    return data is not None


def write(folder: Path, seed: int) -> None:
    """A writer, until it is killed."""
    rng, store = random.Random(seed), opened(folder)
    print("begins", flush=True)
    for i in itertools.count():
        kind, number = rng.choice(list(SIZES)), rng.randrange(NUM_NAMES)
        if not check_read(store, kind, number):
            store.save(kind, number.to_bytes(32, "big"), lambda out, k=kind, n=number: np.copyto(out, data_of(k, n)))
        elif i % 50 == 0:
            entry = store.entry(kind, number.to_bytes(32, "big"))
            assert entry is not None
            with contextlib.suppress(FileNotFoundError):  # another writer evicted it
                os.truncate(folder / entry[0], 99)
        if i % 20 == 0:
            store.flush()


def used_bytes(folder: Path) -> int:
    """The bytes of all entries, while no writer may add or remove one. AssertionError if the folder's own count of them
    is lower."""
    with open(folder / LOCK, "a+b", buffering=0) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        used = sum(file.stat().st_size for file in os.scandir(folder) if ENTRY.fullmatch(file.name))
        counted = os.pread(lock.fileno(), TOTAL.size, 0)
    assert not counted or used <= TOTAL.unpack(counted)[0], used
    return used


def started(folder: Path, seed: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.engine.cache.writers", "--folder", str(folder), "--seed", str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def is_full(folder: Path) -> bool:
    return used_bytes(folder) > MAX_BYTES * 0.8


def killed(folder: Path, num_kills: int, num_writers: int = 3) -> int:
    """Runs writers and kills one after the other; returns the most bytes that entries took."""
    writers, rng, most = [started(folder, seed) for seed in range(num_writers)], random.Random(1), 0
    until = time.monotonic() + 60
    while not is_full(folder) and time.monotonic() < until:
        time.sleep(0.01)
    for kill in range(num_kills):
        writer = writers.pop(0)
        assert writer.stdout is not None and writer.stdout.readline(), "a writer did not begin"
        time.sleep(rng.random() * 0.05)
        most = max(most, used_bytes(folder))
        assert writer.poll() is None, f"a writer ended by itself with exit status {writer.returncode}"
        end(writer)
        if kill < num_kills - num_writers:
            writers.append(started(folder, num_writers + kill))
    for writer in writers:
        end(writer)
    return most


def end(writer: subprocess.Popen) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.communicate()


def check(folder: Path, most: int) -> int:
    """AssertionError unless the folder is as it should be after kills; returns how many entries it has."""
    assert MAX_BYTES * 0.8 < most <= MAX_BYTES, most
    store = opened(folder)
    try:
        num_there = sum(check_read(store, kind, number) for kind in SIZES for number in range(NUM_NAMES))
        assert num_there and used_bytes(folder) <= MAX_BYTES
        for number in range(NUM_NAMES, NUM_NAMES + 200):
            store.save("page", number.to_bytes(32, "big"), lambda out, n=number: np.copyto(out, data_of("page", n)))
        store.flush()
        assert check_read(store, "page", NUM_NAMES + 199) and used_bytes(folder) <= MAX_BYTES
    finally:
        store.close()
    return num_there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="be one of the writers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder is not None:
        write(args.folder, args.seed)
        return
    with scratch_folder() as folder:
        most = killed(folder, args.kills)
        num_left = sum(name.startswith(MAKING) for name in os.listdir(folder))
        num_there = check(folder, most)
        print(
            f"{args.kills} kills: at most {most} of {MAX_BYTES} bytes, {num_left} files left unfinished, "
            f"{num_there} entries there and all of them right"
        )


if __name__ == "__main__":
    main()
