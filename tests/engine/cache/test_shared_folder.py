"""A folder that several processes fill: files are whole, the least recently used make room, and the count of bytes is
never too low."""

import fcntl
import os

import pytest

from lockstep.engine.cache import shared_folder
from lockstep.engine.cache.shared_folder import LOCK, TOTAL, SharedFolder

NAMES = [f"{i:064x}.page" for i in range(10)]


@pytest.fixture
def put(tmp_path):
    """Writes 100 bytes under the name of a number, used so many seconds after the first; returns how many were
    evicted."""

    def written(folder, i, seconds=None):
        num_evicted = folder.put(NAMES[i], [b"head", bytes(96)])
        os.utime(tmp_path / NAMES[i], (1e9 + (i if seconds is None else seconds),) * 2)
        return num_evicted

    return written


def there(folder):
    return [i for i, name in enumerate(NAMES) if folder.has(name)]


def counted(folder):
    return TOTAL.unpack((folder.path / LOCK).read_bytes())[0]


def test_the_bytes_of_all_files_are_counted_once(tmp_path, put):
    one, other = SharedFolder(tmp_path, 1000), SharedFolder(tmp_path, 1000)
    put(one, 1), put(other, 2), put(one, 2)
    assert counted(one) == 200
    assert (tmp_path / NAMES[1]).read_bytes() == b"head" + bytes(96)


def test_the_least_recently_used_make_room_whoever_wrote_or_used_them(tmp_path, put):
    one, other = SharedFolder(tmp_path, 300), SharedFolder(tmp_path, 300)
    put(one, 0), put(other, 1), put(other, 2)
    assert put(one, 3) == 1 and there(one) == [1, 2, 3]
    other.touch(NAMES[1])  # one has listed it as the oldest
    assert put(one, 4) == 1 and there(one) == [1, 3, 4]
    assert put(other, 5) == 1 and there(one) == [1, 4, 5] and counted(one) == 300


def test_a_file_makes_no_room_for_itself(tmp_path, put):
    folder = SharedFolder(tmp_path, 200)
    put(folder, 0), put(folder, 1)
    assert put(folder, 0) == 0 and there(folder) == [0, 1] and counted(folder) == 200


def test_a_count_that_is_too_high_removes_nothing_that_has_room(tmp_path, put):
    folder = SharedFolder(tmp_path, 300)
    for i in range(3):
        put(folder, i)
    for i in range(3):
        folder.remove(NAMES[i])
    assert put(folder, 3) == 0 and counted(folder) == 100


@pytest.mark.parametrize("damage", [b"", b"short", bytes(16), bytes(17), b"x" * 16])
def test_a_count_that_is_damaged_is_made_anew(tmp_path, put, damage):
    folder = SharedFolder(tmp_path, 200)
    put(folder, 0), put(folder, 1)
    (tmp_path / LOCK).write_bytes(damage)
    assert put(folder, 2) == 1 and there(folder) == [1, 2] and counted(folder) == 200


def test_a_lock_file_that_is_removed_is_made_anew(tmp_path, put):
    one, other = SharedFolder(tmp_path, 200), SharedFolder(tmp_path, 200)
    put(one, 0), put(one, 1)
    (tmp_path / LOCK).unlink()
    assert put(other, 2) == 1 and put(one, 3) == 1 and there(one) == [2, 3] and counted(one) == 200


def test_files_come_and_go_by_other_hands(tmp_path, put, monkeypatch):
    folder = SharedFolder(tmp_path, 300)
    put(folder, 0)
    (tmp_path / NAMES[1]).write_bytes(bytes(200))
    (tmp_path / "notes.txt").write_bytes(bytes(1000))
    monkeypatch.setattr(shared_folder, "LIST_SECONDS", -1)
    assert put(folder, 2) == 1 and counted(folder) == 300 and (tmp_path / "notes.txt").exists()


def test_a_holder_that_is_stopped_costs_others_their_writes_only(tmp_path, put, monkeypatch):
    folder = SharedFolder(tmp_path, 300)
    put(folder, 0)
    monkeypatch.setattr(shared_folder, "LOCK_SECONDS", 0.01)
    with open(tmp_path / LOCK, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            put(folder, 1)
        assert SharedFolder(tmp_path, 300).has(NAMES[0])
    assert sorted(os.listdir(tmp_path)) == [LOCK, NAMES[0]]
    assert put(folder, 1) == 0 and counted(folder) == 200


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="its file system has no file locks: No locks available"):
        SharedFolder(tmp_path, 300)
