"""Prefixes on disk: they survive a restart, a damaged one is removed and counted, and the folder stays within its
limit."""

import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.engine.cache import prefix_disk
from lockstep.engine.cache.prefix_disk import HEADER, DiskStore
from lockstep.engine.cache.shared_folder import LOCK, MAKING
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import load_model
from lockstep.engine.request import SamplingParams
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights.store import WeightStore
from tests.engine.cache import writers
from tests.models import tiny
from tests.promise.models import CONFIGS, Case, load

NAMES = [bytes([i]) * 32 for i in range(20)]
DATA = [np.full(100, i, np.uint8) for i in range(20)]
SIZES = dict(page=100, state=300)
CONTENT = SimpleNamespace(known="c" * 64, wait=lambda **_: "c" * 64)


@pytest.fixture
def store(tmp_path):
    """Opens stores in one folder, and ends their threads."""
    made = []

    def opened(max_bytes=1 << 20, sizes=SIZES, **options):
        made.append(DiskStore(tmp_path / "cache", max_bytes, sizes, **{"content": CONTENT, **options}))
        return made[-1]

    yield opened
    for one in made:
        one.close()


def save(store, i, kind="page"):
    store.save(kind, NAMES[i], lambda out: np.copyto(out, np.resize(DATA[i], out.shape)))


def loaded(store, i, kind="page"):
    data = store.load(kind, NAMES[i])
    return None if data is None else data.tolist()


def path(store, i, kind="page"):
    return store.folder / store.entry(kind, NAMES[i])[0]


def entries(folder):
    return sorted(file for file in folder.iterdir() if file.name != LOCK)


def test_entries_are_there_at_once_and_after_a_restart(store):
    first = store()
    save(first, 1)
    save(first, 1, "state")
    assert first.has("page", NAMES[1]) and loaded(first, 1) == [1] * 100, "before it is on disk"
    first.close()
    second = store()
    assert loaded(second, 1) == [1] * 100 and loaded(second, 1, "state") == [1] * 300
    assert not second.has("page", NAMES[2]) and second.counts.damaged == 0


def flip(file):
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


def flip_header(file):
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a bit": flip,
    "a bit of the header": flip_header,
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "empty": lambda f: f.write_bytes(b""),
    "longer": lambda f: f.write_bytes(f.read_bytes() + b"x"),
    "zeros": lambda f: f.write_bytes(bytes(HEADER.size + 100)),
    "another's": lambda f: f.write_bytes(sorted(f.parent.glob("*.page"), key=lambda g: g == f)[0].read_bytes()),
    "unreadable": lambda f: (f.unlink(), f.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_dropped_and_counted_and_never_used(store, damage):
    first = store()
    save(first, 1)
    save(first, 2)
    first.flush()
    DAMAGE[damage](path(first, 1))
    second = store()
    assert loaded(second, 1) is None and second.counts.damaged == 1
    assert not second.has("page", NAMES[1]) and loaded(second, 2) == [2] * 100


def test_an_entry_of_another_kind_is_not_taken_for_one(store):
    first = store(sizes=dict(page=100, state=100))
    save(first, 1)
    first.flush()
    path(first, 1).rename(path(first, 1, "state"))
    second = store(sizes=dict(page=100, state=100))
    assert loaded(second, 1, "state") is None and second.counts.damaged == 1


def test_what_another_process_removed_is_not_damage(store):
    first = store()
    save(first, 1)
    first.flush()
    path(first, 1).unlink()
    assert loaded(first, 1) is None and first.counts.damaged == 0 and not first.has("page", NAMES[1])


def test_what_one_process_wrote_another_finds_at_once(store, monkeypatch):
    monkeypatch.setattr(prefix_disk, "LOOK_SECONDS", 0)
    one, other = store(), store()
    assert not other.has("page", NAMES[1])
    save(one, 1)
    one.flush()
    assert other.has("page", NAMES[1]) and loaded(other, 1) == [1] * 100
    save(other, 1)
    other.flush()
    assert other.counts.written == 0, "it is there already"


def test_what_was_not_there_is_looked_for_again_only_after_a_while(store, monkeypatch):
    one, other = store(), store()
    monkeypatch.setattr(prefix_disk, "LOOK_SECONDS", 1e9)
    assert not other.has("page", NAMES[1])
    save(one, 1)
    one.flush()
    assert not other.has("page", NAMES[1]) and loaded(other, 1) == [1] * 100
    monkeypatch.setattr(prefix_disk, "LOOK_SECONDS", 0)
    assert other.has("page", NAMES[1])


def test_what_another_process_evicted_is_written_again(store):
    one = store()
    save(one, 1)
    one.flush()
    path(one, 1).unlink()
    save(one, 1)
    one.flush()
    assert path(one, 1).exists() and one.counts.written == 2


def test_writers_that_are_killed_leave_a_folder_that_is_right(tmp_path):
    writers.check(tmp_path, writers.killed(tmp_path, 6))


def test_the_folder_keeps_what_was_used_last_within_its_bytes(store):
    entry = HEADER.size + 100
    first = store(max_bytes=3 * entry)
    for i in range(3):
        save(first, i)
        first.flush()
        os.utime(path(first, i), (time.time() - 100 + i,) * 2)
    assert loaded(first, 0) == [0] * 100
    second = store(max_bytes=3 * entry)
    save(second, 3)
    second.flush()
    kept = [i for i in range(4) if path(second, i).exists()]
    assert kept == [0, 2, 3] and second.counts.evicted == 1, "a load counts as use"


def test_the_bytes_of_other_processes_count_too(store):
    entry = HEADER.size + 100
    one, other = store(max_bytes=4 * entry), store(max_bytes=4 * entry)
    for i in range(4):
        save(other, i)
        other.flush()
        os.utime(path(other, i), (time.time() - 100 + i,) * 2)
    for i in (4, 5):
        save(one, i)
        one.flush()
    assert [i for i in range(6) if path(one, i).exists()] == [2, 3, 4, 5]
    assert loaded(one, 3) == [3] * 100 and loaded(other, 0) is None and other.counts.damaged == 0


def test_what_two_processes_write_counts_once(store):
    one, other = (store(max_bytes=3 * (HEADER.size + 100)) for _ in range(2))
    write, go_on = one.shared.put, threading.Event()

    def slow(*entry):
        go_on.wait()
        return write(*entry)

    one.shared.put = slow
    for i in (0, 1, 2):
        save(one, i)
    for i in (1, 2):
        save(other, i)
    other.flush()
    go_on.set()
    one.flush()
    assert all(path(one, i).exists() for i in range(3)) and one.counts.evicted == 0


def test_what_is_too_much_to_write_is_skipped(store):
    small = store(max_bytes=100)
    save(small, 1)
    small.flush()
    assert small.counts.skipped == 1 and not small.has("page", NAMES[1])
    slow = store(max_pending=99)
    save(slow, 1)
    assert slow.counts.skipped == 1


def test_a_full_disk_only_means_that_nothing_is_kept_and_this_is_said_once(store, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    made = store()
    monkeypatch.setattr(os, "replace", full)
    for number in (1, 2):
        save(made, number)
    made.flush()
    assert made.counts.skipped == 2 and loaded(made, 1) is None and not entries(made.folder)
    [record] = caplog.records
    assert record.message.startswith(
        f"A computed prompt (0.0 MB) cannot be kept in {made.folder}: No space left on dev"
    )
    assert record.message.endswith(" MB are free. Free some space there, or set cache_dir to a folder elsewhere.")


def test_leftovers_of_a_killed_writer_are_removed_and_never_read(store):
    first = store()
    old, new = first.folder / f"{MAKING}old", first.folder / f"{MAKING}new"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    second = store()
    save(second, 1)
    second.flush()
    assert new.exists() and not old.exists()


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir .*file/cache"):
        DiskStore(tmp_path / "file" / "cache", 1 << 20, SIZES, CONTENT)


def test_a_folder_that_others_can_write_to_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ValueError, match=r"cache_dir: .*other users can write here.*mode 777"):
        DiskStore(tmp_path / "cache", 1 << 20, SIZES, CONTENT)


class Hashing:
    """Stands in for the ContentHash of a model that is still being hashed."""

    known = None

    def wait(self, timeout):
        if self.known is None:
            raise TimeoutError


def test_nothing_is_on_disk_until_the_content_hash_is_known(store):
    hashing = Hashing()
    first = store(content=hashing)
    save(first, 1)
    assert loaded(first, 1) == [1] * 100 and not entries(first.folder)
    hashing.known = "a" * 64
    first.flush()
    assert loaded(store(content=hashing), 1) == [1] * 100
    assert not store().has("page", NAMES[1]), "another model's entry"


def test_what_is_never_known_is_never_written(store, monkeypatch):
    first = store(content=Hashing())
    save(first, 1)
    first.close()
    assert not entries(first.folder) and first.counts.skipped == 1


# ---------------------------------------------------------------- with an engine


@pytest.fixture(scope="module", params=[Case("qwen3_5", "f32", "bf16"), Case("qwen3", "q8_0", "bf16")], ids=str)
def model(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("tiny"))


PROMPT = np.random.RandomState(1).randint(3, 90, 300).tolist()
PARAMS = SamplingParams(max_tokens=20, temperature=0.8, seed=4, ignore_eos=True)


def run(model, prompt, **options):
    """(tokens and logprobs, counts of the prefix cache, counts of the disk store) of one prompt on a new engine."""
    engine = Engine(model, EngineOptions(threads=1, max_requests=2, state_every=64, **options))
    try:
        request = engine.add(prompt, PARAMS)
        while engine.has_work:
            engine.step()
        prefix = engine.scheduler.prefix
        return (request.output_ids, request.logprobs), prefix.counts, prefix.disk and prefix.disk.counts
    finally:
        engine.close()


def test_a_second_engine_answers_from_disk_with_the_same_bits(model, tmp_path):
    cold, _, _ = run(model, PROMPT)
    first, counts, disk = run(model, PROMPT, cache_dir=tmp_path)
    assert counts.hit_tokens == 0 and disk.written >= 4
    second, counts, disk = run(model, PROMPT, cache_dir=tmp_path)
    assert counts.hit_tokens == 256 and disk.loaded >= 4 and disk.damaged == 0
    assert cold == first == second


def test_an_engine_finds_what_another_wrote_while_both_run(model, tmp_path):
    options = EngineOptions(threads=1, max_requests=2, state_every=64, cache_dir=tmp_path)
    engines, found = [Engine(model, options) for _ in range(2)], []
    try:
        for engine in engines:
            found.append(engine.add(PROMPT, PARAMS))
            while engine.has_work:
                engine.step()
            engine.scheduler.prefix.disk.flush()
    finally:
        for engine in engines:
            engine.close()
    one, other = found
    assert (one.output_ids, one.logprobs) == (other.output_ids, other.logprobs)
    assert one.num_cached == 0 and other.num_cached == 256


def test_damage_on_disk_costs_time_and_no_bits(model, tmp_path):
    cold, _, _ = run(model, PROMPT, cache_dir=tmp_path)
    for i, file in enumerate(entries(tmp_path)):
        if i % 2:
            flip(file)
    again, counts, disk = run(model, PROMPT, cache_dir=tmp_path)
    assert cold == again and disk.damaged > 0 and counts.hit_tokens < 256
    assert run(model, PROMPT, cache_dir=tmp_path)[1].hit_tokens == 256, "what was dropped was written again"


def test_another_kv_format_finds_nothing(tmp_path):
    config = CONFIGS["qwen3"]
    checkpoint = open_checkpoint(tiny.write(tmp_path, config, tiny.tensors(config, 11)))
    for kv_dtype, found in (("bf16", 0), ("f32", 0), ("q8", 0), ("f32", 256), ("q8", 256)):
        model = load_model(checkpoint, WeightStore(), "f32", kv_dtype, 2304)
        assert run(model, PROMPT, cache_dir=tmp_path / "cache")[1].hit_tokens == found


def test_a_cache_dir_without_a_prefix_cache_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="cache_dir"):
        Engine(model, EngineOptions(threads=1, prefix_cache=False, cache_dir=tmp_path))
