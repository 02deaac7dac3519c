"""Packed weights that are truncated or written to while a process uses them: it goes on, with the right bits."""

import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from lockstep.weights.leased_map import LeasedMaps
from tests.kernels import shared_kernels

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8)


@pytest.fixture(autouse=True)
def leases(tmp_path):
    """Skips the test if the system or the file system has no leases."""
    if not hasattr(fcntl, "F_SETLEASE"):
        pytest.skip("leases are Linux's")
    (tmp_path / "empty").touch()
    with open(tmp_path / "empty", "rb") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            pytest.skip(f"no leases on this file system: {error}")


@pytest.fixture
def path(tmp_path):
    CONTENT.tofile(tmp_path / "w")
    return tmp_path / "w"


def mapped(maps, path):
    with open(path, "rb") as file:
        return maps.map(file.fileno())


def is_mapped(path):
    with open("/proc/self/maps") as maps:
        return str(path) in maps.read()


def written(path):
    with open(path, "r+b") as file:
        file.write(bytes(len(CONTENT)))


def replaced_in_place(path):
    path.write_bytes(b"another")


CHANGES = [lambda path: os.truncate(path, 0), lambda path: os.truncate(path, 150_001), written, replaced_in_place]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("start, size", [(0, 5), (4096, 4096), (70_001, 80_000)])
def test_a_map_of_a_part_stays_as_it_was(path, start, size, change):
    with open(path, "rb") as file:
        array = LeasedMaps().map(file.fileno(), start, size)
    expected = CONTENT.view(np.uint8)[start : start + size]
    assert (array == expected).all() and is_mapped(path)
    change(path)
    assert (array == expected).all() and not is_mapped(path)


@pytest.mark.parametrize("change", CHANGES)
def test_a_map_stays_as_it_was_whatever_is_done_to_the_file(path, change):
    array = mapped(LeasedMaps(), path)
    assert not array.flags.writeable and is_mapped(path)
    change(path)
    assert path.read_bytes() != CONTENT.tobytes()
    assert (array == CONTENT).all() and not is_mapped(path)


def test_readers_see_the_same_bytes_while_a_copy_takes_the_place_of_the_map(tmp_path):
    maps, done, wrong = LeasedMaps(), threading.Event(), []
    paths = [tmp_path / str(i) for i in range(20)]
    for each in paths:
        CONTENT.tofile(each)
    arrays = [mapped(maps, each) for each in paths]

    def read():
        while not done.is_set():
            wrong.extend(i for i, array in enumerate(arrays) if not np.array_equal(array, CONTENT))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for i, each in enumerate(paths):
        CHANGES[i % len(CHANGES)](each)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong and not any(map(is_mapped, paths))


def test_two_processes_may_map_a_file_and_neither_minds_that_it_is_removed(path):
    first, second = mapped(LeasedMaps(), path), mapped(LeasedMaps(), path)
    os.utime(path, (1, 1))
    os.unlink(path)
    assert (first == CONTENT).all() and (second == CONTENT).all()


def test_a_file_that_somebody_may_write_to_is_not_mapped(path):
    with open(path, "r+b"):
        assert mapped(LeasedMaps(), path) is None
    assert mapped(LeasedMaps(), path) is not None
    assert mapped(LeasedMaps(), os.devnull) is None


def test_what_nobody_reads_any_more_is_given_back(path):
    maps = LeasedMaps()
    array = mapped(maps, path)
    part = array[5:10]
    del array
    gc.collect()
    assert is_mapped(path) and (part == CONTENT[5:10]).all()
    del part
    gc.collect()
    deadline = time.monotonic() + 30
    while maps.is_watching or is_mapped(path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    path.write_bytes(b"nobody minds")
    assert mapped(maps, path).tobytes() == b"nobody minds"


LOST = """
import fcntl, sys, time
from lockstep.weights.leased_map import LeasedMaps
from tests.kernels import shared_kernels

maps = LeasedMaps()
with open(sys.argv[1], "rb") as file:
    array = maps.map(file.fileno())
[(address, (size, _, descriptor))] = maps._held.items()
print(array.sum(), flush=True)
fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # as the kernel does after 45 s
maps._wake()
while maps._held[address].descriptor is not None:
    time.sleep(0.01)
print("read", array.sum())
"""


def test_whoever_lost_a_lease_ends_instead_of_reading_what_the_file_has_become(path):
    found = subprocess.run([sys.executable, "-c", LOST, str(path)], capture_output=True, text=True, timeout=100)
    assert found.returncode == -signal.SIGSEGV and found.stdout == f"{CONTENT.sum()}\n", found.stderr
    assert "changed on disk before they could be copied" in found.stderr


PROGRAM = """
import os, sys
from pathlib import Path
from lockstep import LLM, SamplingParams

folder = Path(sys.argv[1])

def answers(llm):
    made = llm.generate(["Once upon a time", "The sea"], SamplingParams(max_tokens=12, logprobs=2, ignore_eos=True))
    return [(each.token_ids, each.logprobs) for each in made]

def packed():
    return sorted((folder / "packed").glob("*/*.packed"))

def start():
    llm = LLM(threads=2, max_requests=2, max_context=512)
    llm.content.wait()
    return llm

first = start()
expected = answers(first)
first.close()
llm = start()
files = packed()
maps = Path("/proc/self/maps").read_text()
assert files and sum(str(path) in maps for path in files) > len(files) // 2, maps
assert answers(llm) == expected
for i, path in enumerate(files):
    size = path.stat().st_size
    os.truncate(path, 0 if i % 2 else size // 2 + 1)
assert answers(llm) == expected
llm.close()
again = start()
assert answers(again) == expected
again.close()
assert all(path.stat().st_size >= 4096 for path in packed())
print("right")
"""


def test_a_model_answers_right_while_its_packed_weights_are_cut_and_after(tmp_path):
    cache = shared_kernels(tmp_path / "cache")
    command, environment = [sys.executable, "-c", PROGRAM, str(cache)], os.environ | {"LOCKSTEP_CACHE": str(cache)}
    found = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert (found.returncode, found.stdout) == (0, "right\n"), found.stderr
