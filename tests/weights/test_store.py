"""Packed weights on disk: found by content hash, checked, packed again if damaged, and limited in size."""

import json
import os
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep import user_cache
from lockstep.formats import F32
from lockstep.formats.pack import pack
from lockstep.models.checkpoint import open_checkpoint
from lockstep.runtime.backend import Layout
from lockstep.runtime.program import Weight
from lockstep.weights import content, packed_cache, packed_file, store
from lockstep.weights.leased_map import LeasedMaps
from lockstep.weights.packed_file import Damaged
from lockstep.weights.store import PackedStore
from tests.weights.files import safetensors_bytes
from tests.weights.test_content import OTHER, WEIGHTS, model

ARRAYS = (np.arange(7, dtype=np.float32), np.arange(5000, dtype=np.uint8).reshape(50, 100), np.ones((3, 2), np.float16))
LAYOUT = Layout("f32 panels", partial(pack, F32))


# ---------------------------------------------------------------- one file


def equal(found, expected):
    return [(a.dtype, a.shape, a.tobytes()) for a in found] == [(a.dtype, a.shape, a.tobytes()) for a in expected]


@pytest.fixture
def path(tmp_path):
    packed_file.write(tmp_path / "w.packed", "w", ARRAYS)
    return tmp_path / "w.packed"


class NoLeases:
    """LeasedMaps on a system, or for a file, without leases."""

    def map(self, descriptor):
        return None


@pytest.fixture(params=[LeasedMaps, NoLeases])
def maps(request):
    return request.param()


def test_what_was_written_is_read_from_lines_of_its_own_and_read_only(path, maps):
    found = packed_file.read(path, "w", maps)
    assert equal(found, ARRAYS) and equal(packed_file.read(path, "w", maps, verify=True), ARRAYS)
    assert all(a.ctypes.data % 64 == 0 and not a.flags.writeable for a in found)
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == ["w.packed"]


def flipped(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "a bit of the first array": lambda p: flipped(p, 4096),
    "a bit of the last array": lambda p: flipped(p, 4096 * 4),
    "a bit of the shapes": lambda p: flipped(p, 100),
    "a bit of the checksum": lambda p: flipped(p, 20),
    "cut": lambda p: os.truncate(p, p.stat().st_size - 1),
    "cut to a page": lambda p: os.truncate(p, 4096),
    "empty": lambda p: os.truncate(p, 0),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
}


def in_place(path):
    with open(path, "r+b") as file:
        file.seek(4100)
        file.write(b"\x77")


DAMAGES["a bit, in place"] = in_place


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage, path, maps):
    DAMAGES[damage](path)
    with pytest.raises(Damaged):
        packed_file.read(path, "w", maps)


def test_damage_that_keeps_the_time_is_found_by_verification(path, maps):
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    packed_file.read(path, "w", maps)
    with pytest.raises(Damaged, match="its content is"):
        packed_file.read(path, "w", maps, verify=True)


def test_another_weights_file_is_refused(path, maps):
    with pytest.raises(Damaged, match=r"'w', expected .* of 'v'"):
        packed_file.read(path, "v", maps)


def test_a_checked_file_is_not_checked_again_until_the_machine_was_started_again(path, monkeypatch, maps):
    checks, check = [], packed_file.check
    monkeypatch.setattr(packed_file, "check", lambda *args: (checks.append(args), check(*args)))
    packed_file.read(path, "w", maps)
    assert not checks
    os.utime(path)
    packed_file.read(path, "w", maps)
    packed_file.read(path, "w", maps)
    assert len(checks) == 1
    monkeypatch.setattr(packed_file, "_boot", lambda: b"another boot")
    packed_file.read(path, "w", maps)
    packed_file.read(path, "w", maps)
    assert len(checks) == 2


# ---------------------------------------------------------------- the packed weights of a model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A fresh user cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOCKSTEP_CACHE", str(folder))
    monkeypatch.setattr(content, "SETTLED_NS", 0)
    return folder


def weight_of(checkpoint):
    return Weight("w", "f32", (2, 2), (checkpoint.tensors["w"],))


class Packing:
    """A layout that counts how often it is packed."""

    def __init__(self):
        self.count = 0

    def arrays(self, folder, **options):
        checkpoint = open_checkpoint(folder, **options)
        made = PackedStore(checkpoint).arrays(weight_of(checkpoint), Layout("f32 panels", self.pack))
        checkpoint.content.wait(timeout=60)
        return made[0].view(F32.packed.panel)["codes"]

    def pack(self, weight):
        self.count += 1
        return pack(F32, weight)


def test_two_models_with_equal_headers_and_times_never_share_packed_weights(tmp_path):
    """Otherwise the second model would run with weights of the first."""
    one, other, packing = model(tmp_path / "a"), model(tmp_path / "b", OTHER), Packing()
    for folder in (one, other):
        os.utime(folder / "model.safetensors", (1, 1))
    first, second = packing.arrays(one), packing.arrays(other)
    assert first[0, :2, :2].T.tolist() == WEIGHTS["w"].tolist()
    assert second[0, :2, :2].T.tolist() == OTHER["w"].tolist()
    assert packing.count == 2


def test_two_indexes_over_the_same_files_never_share_packed_weights(tmp_path):
    """Through links, so that even the stamps of the files are equal."""
    files, packing, found = tmp_path / "files", Packing(), []
    files.mkdir()
    for number, weights in (("1", WEIGHTS), ("2", OTHER)):
        (files / f"{number}.safetensors").write_bytes(safetensors_bytes({**weights, f"only in {number}": OTHER["w"]}))
    for chosen in ("1", "2"):
        folder = tmp_path / f"index {chosen}"
        folder.mkdir()
        for number in ("1", "2"):
            (folder / f"{number}.safetensors").symlink_to(files / f"{number}.safetensors")
        index = {"w": chosen, "only in 1": "1", "only in 2": "2"}
        index = {"weight_map": {name: f"{number}.safetensors" for name, number in index.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        found.append(packing.arrays(folder)[0, :2, :2].T.tolist())
    assert found == [WEIGHTS["w"].tolist(), OTHER["w"].tolist()] and packing.count == 2


def test_a_copy_is_not_packed_again(tmp_path, cache):
    packing = Packing()
    first = packing.arrays(model(tmp_path / "a"))
    assert (packing.arrays(model(tmp_path / "b")) == first).all() and packing.count == 1
    assert (packing.arrays(tmp_path / "a") == first).all() and packing.count == 1
    assert len(packed_cache.models(cache / "packed")) == 1


def test_until_the_content_is_known_packed_weights_wait_under_a_name_of_that_file(tmp_path, cache, monkeypatch):
    read, go_on = content.read_digest, threading.Event()
    monkeypatch.setattr(content, "read_digest", lambda *args: (go_on.wait(), read(*args))[1])
    checkpoint = open_checkpoint(model(tmp_path / "a"))
    made = PackedStore(checkpoint)
    made.arrays(weight_of(checkpoint), LAYOUT)
    waiting = list((cache / "packed").iterdir())
    assert [folder.name.startswith(packed_cache.PROVISIONAL) for folder in waiting] == [True]
    # After a process ended before the hash was known, the next one finds its packed weights, if the file is the same.
    packing = Packing()
    again = open_checkpoint(tmp_path / "a")
    PackedStore(again).arrays(weight_of(again), Layout("f32 panels", packing.pack))
    assert packing.count == 0
    (tmp_path / "a" / "model.safetensors").touch()
    touched = open_checkpoint(tmp_path / "a")
    monkeypatch.setattr(PackedStore, "_is_like_a_packed_one", lambda self: False)  # else it would wait for the hash
    PackedStore(touched).arrays(weight_of(touched), Layout("f32 panels", packing.pack))
    assert packing.count == 1, "a file of another time may be another file"
    go_on.set()
    assert touched.content.wait(timeout=60)


def test_what_waited_moves_under_the_content_when_it_is_known(tmp_path, cache):
    packing = Packing()
    packing.arrays(model(tmp_path / "a"))
    digest = open_checkpoint(tmp_path / "a").content.wait(timeout=60)
    [kept] = packed_cache.models(cache / "packed")
    assert kept.folder.name.startswith(digest[:32]) and kept.model == str(tmp_path / "a")
    assert len(list(kept.folder.glob("*.packed"))) == 1


@pytest.mark.parametrize("damage", ["cut", "a bit, in place", "empty"])
def test_a_damaged_packed_weight_is_made_again(damage, tmp_path, cache):
    packing = Packing()
    first = packing.arrays(model(tmp_path / "a")).copy()
    [file] = cache.rglob("*.packed")
    DAMAGES[damage](file)
    assert (packing.arrays(tmp_path / "a") == first).all() and packing.count == 2
    assert (packing.arrays(tmp_path / "a") == first).all() and packing.count == 2, "it was written again"


def test_verification_reads_packed_weights_too(tmp_path, cache):
    packing = Packing()
    first = packing.arrays(model(tmp_path / "a")).copy()
    [file] = cache.rglob("*.packed")
    before = file.stat()
    in_place(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (packing.arrays(tmp_path / "a", verify=True) == first).all() and packing.count == 2


def test_a_file_that_changes_while_it_is_packed_is_not_kept(tmp_path, cache):
    checkpoint = open_checkpoint(model(tmp_path / "a"))
    made, weight = PackedStore(checkpoint), weight_of(checkpoint)
    checkpoint.content.wait(timeout=60)
    os.utime(tmp_path / "a" / "model.safetensors", (1, 1))
    made.arrays(weight, LAYOUT)
    assert made.num_bytes_not_kept and not list(cache.rglob("*.packed"))


# ---------------------------------------------------------------- limits


def test_packed_weights_take_a_fifth_of_what_is_free_and_64_gb_at_most(tmp_path, monkeypatch):
    free = 100_000_000_000
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=free)))
    assert packed_cache.allowed_bytes(tmp_path, 0) == 20_000_000_000
    assert packed_cache.allowed_bytes(tmp_path, 50_000_000_000) == 30_000_000_000
    free = 10_000_000_000_000
    assert packed_cache.allowed_bytes(tmp_path, 0) == 64_000_000_000
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "1.5")
    assert packed_cache.allowed_bytes(tmp_path, 0) == 1_500_000_000
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "")
    assert packed_cache.allowed_bytes(tmp_path, 0) == 64_000_000_000, "as if it were not set"
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("LOCKSTEP_CACHE_GB", wrong)
        with pytest.raises(ValueError, match="LOCKSTEP_CACHE_GB: expected a number of gigabytes"):
            packed_cache.allowed_bytes(tmp_path, 0)


def test_the_model_used_longest_ago_makes_room(tmp_path, cache, monkeypatch):
    packing, folders = Packing(), [tmp_path / name for name in "abc"]
    for i, folder in enumerate(folders[:2]):
        packing.arrays(model(folder, {"w": WEIGHTS["w"] + i}))
    for i, kept in enumerate(sorted(packed_cache.models(cache / "packed"), key=lambda m: m.model)):
        os.utime(kept.folder / packed_cache.ABOUT, (1000 - i, 1000 - i))  # b was used before a
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "0.000017")
    packing.arrays(model(folders[2], {"w": WEIGHTS["w"] + 2}))
    assert {m.model for m in packed_cache.models(cache / "packed")} == {str(folders[0]), str(folders[2])}
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "0")
    made = PackedStore(checkpoint := open_checkpoint(model(tmp_path / "d", OTHER)))
    made.arrays(weight_of(checkpoint), LAYOUT)
    assert made.num_bytes_not_kept and not list(cache.rglob("*.packed"))


def not_kept(folder, caplog):
    """The bytes of a model's packed weight that were not kept, and what is said of them."""
    checkpoint = open_checkpoint(folder)
    made = PackedStore(checkpoint)
    made.arrays(weight_of(checkpoint), LAYOUT)
    caplog.clear()
    made.warn_not_kept()
    return made.num_bytes_not_kept, [record.message for record in caplog.records]


def test_what_finds_no_room_is_named_with_its_folder_its_size_and_what_helps(tmp_path, cache, monkeypatch, caplog):
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "1")
    monkeypatch.setattr(user_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    size, [said] = not_kept(model(tmp_path / "a"), caplog)
    where = f"0 of 0 MB of packed weights cannot be kept in {cache}/packed, so the next start packs them again: "
    assert size and said == where + (
        "No space left on device, 0.0 MB are free. Free some space there, or set LOCKSTEP_CACHE to a folder elsewhere."
    )
    monkeypatch.delenv("LOCKSTEP_CACHE_GB")
    assert not_kept(tmp_path / "a", caplog)[1] == [], "said before"
    assert not list(cache.rglob("*.packed"))


@pytest.mark.parametrize(
    "gigabytes, said",
    [
        ("", "they may take 0 MB, 20% of the room on this disk, where 0 MB are free."),
        ("0", "LOCKSTEP_CACHE_GB=0 allows 0 MB."),
    ],
)
def test_the_limit_of_packed_weights_is_named(gigabytes, said, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", gigabytes)
    monkeypatch.setattr(user_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    size, [text] = not_kept(model(tmp_path / "a"), caplog)
    assert size and f"{said} Set LOCKSTEP_CACHE_GB to more gigabytes, or LOCKSTEP_CACHE to a folder elsewhere." in text


def test_weights_that_were_kept_are_no_matter(tmp_path, caplog):
    assert not_kept(model(tmp_path / "a"), caplog) == (0, [])


def test_nothing_is_packed_into_a_folder_that_does_not_last(tmp_path, cache, monkeypatch, caplog):
    monkeypatch.setattr(store, "cache_lasts", lambda: False)
    size, said = not_kept(model(tmp_path / "a"), caplog)
    assert size and not said and not list(cache.rglob("*.packed"))


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path, cache):
    packing = Packing()
    packing.arrays(model(tmp_path / "a"))
    [kept] = packed_cache.models(cache / "packed")
    left = kept.folder / ".making-0123456789abcdef"
    left.write_bytes(bytes(1000))
    packing.arrays(tmp_path / "a")
    assert packing.count == 1 and not left.exists()


def test_pruning_breaks_no_running_process(tmp_path, cache):
    first = Packing().arrays(model(tmp_path / "a")).copy()
    checkpoint = open_checkpoint(tmp_path / "a")
    mapped = PackedStore(checkpoint).arrays(weight_of(checkpoint), LAYOUT)[0]
    assert packed_cache.prune(cache / "packed", 0) == 0
    assert not list((cache / "packed").iterdir())
    assert (mapped.view(F32.packed.panel)["codes"] == first).all()
    packing = Packing()
    assert (packing.arrays(tmp_path / "a") == first).all() and packing.count == 1
