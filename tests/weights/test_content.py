"""Content hashes depend on content only, not on names, times or headers; files with a known digest are not read."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights import content
from tests.weights.files import safetensors_bytes

WEIGHTS = {"w": np.arange(4, dtype=np.float32).reshape(2, 2)}
CONFIG = {"model_type": "llama"}
OTHER = {"w": np.arange(1, 5, dtype=np.float32).reshape(2, 2)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A fresh user cache folder."""
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "SETTLED_NS", 0)  # a test's files are younger than the usual limit
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The paths that were read for their digest."""
    made, read = [], content.read_digest
    monkeypatch.setattr(content, "read_digest", lambda path, *rest: (made.append(path), read(path, *rest))[1])
    return made


def model(folder, weights=WEIGHTS, config=CONFIG):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hash_of(folder, **options):
    return open_checkpoint(folder, **options).content.wait(timeout=60)


def test_two_fine_tunes_with_equal_names_sizes_headers_and_times_differ(tmp_path):
    one, other = model(tmp_path / "a" / "m"), model(tmp_path / "b" / "m", OTHER)
    for folder in (one, other):
        os.utime(folder / "model.safetensors", (1, 1))
    assert open_checkpoint(one).header_hash == open_checkpoint(other).header_hash
    assert hash_of(one) != hash_of(other)


def test_a_copy_has_the_name_of_its_original(tmp_path):
    one = model(tmp_path / "m")
    shutil.copytree(one, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "renamed.safetensors")
    assert hash_of(one) == hash_of(tmp_path / "copy") and len(hash_of(one)) == 64


def test_the_config_belongs_to_the_name(tmp_path):
    assert hash_of(model(tmp_path / "m")) != hash_of(model(tmp_path / "n", config={"model_type": "qwen3"}))


def test_an_index_that_takes_another_files_tensor_makes_another_model(tmp_path):
    """Two folders with the same two files, which both have the tensor; their indexes choose different ones."""
    names = []
    for chosen in ("1", "2"):
        folder = tmp_path / chosen
        folder.mkdir()
        for number, weights in (("1", WEIGHTS), ("2", OTHER)):
            raw = safetensors_bytes({**weights, f"only in {number}": WEIGHTS["w"]})
            (folder / f"model-{number}.safetensors").write_bytes(raw)
        shards = {"w": chosen, "only in 1": "1", "only in 2": "2"}
        index = {"weight_map": {name: f"model-{number}.safetensors" for name, number in shards.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        names.append((hash_of(folder), open_checkpoint(folder).header_hash))
    assert len({name for name, _ in names}) == 2 and len({header for _, header in names}) == 2


def test_a_file_from_the_future_is_read_once_too(tmp_path, reads):
    folder = model(tmp_path / "m")
    os.utime(folder / "model.safetensors", (4e9, 4e9))
    assert hash_of(folder) == hash_of(folder) and len(reads) == 1


def test_a_file_is_read_once_until_it_changes(tmp_path, reads, cache):
    folder = model(tmp_path / "m")
    first = hash_of(folder)
    [kept] = (cache / "hashes").iterdir()
    os.utime(kept, (1, 1))
    assert hash_of(folder) == first and len(reads) == 1
    assert kept.stat().st_mtime > 1, "what is used is not pruned as old"
    path = folder / "model.safetensors"
    before = path.stat()
    path.write_bytes(safetensors_bytes(OTHER))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_of(folder) != first and len(reads) == 2, "size and mtime are the same, ctime is not"


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(content, "SETTLED_NS", 3_600_000_000_000)
    folder = model(tmp_path / "m")
    assert hash_of(folder) == hash_of(folder) and len(reads) == 2


@pytest.mark.parametrize("damage", ["", "no digest", "\xff" * 64, "0" * 63])
def test_a_damaged_memory_is_not_believed(damage, tmp_path, reads, cache):
    folder = model(tmp_path / "m")
    first = hash_of(folder)
    for path in (cache / "hashes").iterdir():
        path.write_text(damage, "latin-1")
    assert hash_of(folder) == first and len(reads) == 2


# ---------------------------------------------------------------- the hub's cache


def hub_model(root, weights=WEIGHTS, digest=None):
    """A model in the layout of the hub's cache: links to blobs, where the large blob is named by its SHA-256."""
    raw = safetensors_bytes(weights)
    blobs, snapshot = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / ("5" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, blob, data in (
        ("model.safetensors", digest or hashlib.sha256(raw).hexdigest(), raw),
        ("config.json", "c" * 40, json.dumps({"model_type": "llama"}).encode()),
    ):
        (blobs / blob).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_blob_of_the_hub_is_named_by_its_digest_and_not_read(tmp_path, reads, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hash_of(hub_model(tmp_path / "hub")) == hash_of(model(tmp_path / "m"))
    assert reads == [tmp_path / "m" / "model.safetensors"]


def test_a_folder_that_only_looks_like_the_hubs_is_read(tmp_path, reads, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    lying = hub_model(tmp_path / "download", OTHER, hashlib.sha256(safetensors_bytes(WEIGHTS)).hexdigest())
    assert hash_of(lying) == hash_of(model(tmp_path / "m", OTHER)) and len(reads) == 2


def test_a_git_hash_is_no_digest(tmp_path, reads, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    hash_of(hub_model(tmp_path / "hub", digest="d" * 40))
    assert len(reads) == 1


def test_verification_reads_what_is_known_and_refuses_a_damaged_blob(tmp_path, reads, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = hub_model(tmp_path / "hub")
    assert hash_of(snapshot, verify=True) == hash_of(snapshot) and len(reads) == 1
    (snapshot / "model.safetensors").resolve().write_bytes(safetensors_bytes(OTHER))
    hash_of(snapshot)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged: the hub names it [0-9a-f]{64}, its content is"):
        hash_of(snapshot, verify=True)


def test_where_the_hub_keeps_its_files(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert content.hub_cache() == tmp_path / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert content.hub_cache() == tmp_path / "x/huggingface/hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    assert content.hub_cache() == tmp_path / "h/hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
    assert content.hub_cache() == tmp_path / "c"


# ---------------------------------------------------------------- while files are read


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    folder = model(tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.stamps
    (folder / "model.safetensors").write_bytes(safetensors_bytes(OTHER) + b"")
    os.utime(folder / "model.safetensors", (5, 5))
    with pytest.raises(ValueError, match=r"model\.safetensors: the file changed while the model was being loaded"):
        checkpoint.content.wait(timeout=60)
    with pytest.raises(ValueError, match="the file changed"):
        assert checkpoint.content.known


def test_a_hash_is_made_beside_other_work_and_tells_how_far_it_is(tmp_path, monkeypatch):
    read, go_on = content.read_digest, content.threading.Event()
    monkeypatch.setattr(content, "read_digest", lambda *args: (go_on.wait(), read(*args))[1])
    made, told = open_checkpoint(model(tmp_path / "m")).content, []
    made.when_known(told.append)
    assert made.known is None and not told
    with pytest.raises(TimeoutError):
        made.wait(timeout=0.01)
    seen = []
    digest = made.wait(lambda *args: (seen.append(args), go_on.set()))
    assert made.known == digest and told == [digest]
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert seen[0] == ("reading", 0, size)


def test_the_memory_of_digests_is_bounded(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(content, "MAX_REMEMBERED", 10)
    folder = model(tmp_path / "m")
    for i in range(30):
        content.remember(content.Stamp("p", i, 0, 0, 0, i), "a" * 64)
    hash_of(folder)
    assert len(list((cache / "hashes").iterdir())) <= 10
