"""Files that appear whole or not at all, and folders of one process: nothing that a kill leaves stays for good."""

import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest

from lockstep import new_files
from lockstep.new_files import MAKING, SCRATCH, new_file, remove_leftovers, scratch_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from lockstep.new_files import new_file, scratch_folder
folder = Path(sys.argv[1])
with scratch_folder(folder) as scratch, new_file(folder / "file") as file:
    (scratch / "inside").write_text("")
    file.write(bytes(100_000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def no_file_above(num_bytes):
    """A disk that is full after some bytes, as the system reports it (SIGXFSZ is ignored by Python)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with new_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first" and stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(KeyError), new_file(path) as file:
        file.write(b"second")
        raise KeyError
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_finds_no_room_is_not_there(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    with (
        pytest.raises(OSError, match=r"File too large: .*/file'"),
        no_file_above(50_000),
        new_file(tmp_path / "file") as file,
    ):
        file.write(bytes(100_000))
    assert (tmp_path / "file").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and left[0].startswith(MAKING) and left[1].startswith(SCRATCH)
    with ExitStack() as stack:
        mine = stack.enter_context(new_file(tmp_path / "mine"))
        scratch = stack.enter_context(scratch_folder(tmp_path))
        remove_leftovers(tmp_path)
        remove_leftovers(tmp_path, new_files.SCRATCH_FOLDER)
        mine.write(b"whole")
        assert len(list(tmp_path.iterdir())) == 2, "what a process still needs is left alone"
        assert not set(left) & {path.name for path in tmp_path.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not scratch.exists()


def test_without_locks_what_is_old_is_left_over(tmp_path, monkeypatch):
    monkeypatch.setattr(new_files, "take_lock", lambda handle: None)
    new, old, other = (tmp_path / name for name in (f"{MAKING}0123456789abcdef", f"{MAKING}old45678", f"{MAKING}x"))
    for path in (new, old, other):
        path.write_text("")
    for path in (old, other):
        os.utime(path, (1, 1))
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([new, other]), "only what has a name of ours"
    remove_leftovers(tmp_path / "missing")


def test_a_folder_that_was_taken_for_left_over_is_made_again(tmp_path, monkeypatch):
    """Between making and locking it another process may come."""
    made, lock = [], new_files.take_lock
    monkeypatch.setattr(
        new_files, "make_folder", lambda path, make=new_files.make_folder: (made.append(path), make(path))[1]
    )
    monkeypatch.setattr(new_files, "take_lock", lambda handle: (len(made) == 1 and made[0].rmdir(), lock(handle))[1])
    with scratch_folder(tmp_path) as folder:
        assert len(made) == 2 and folder == made[1] and folder.is_dir() and not made[0].exists()
