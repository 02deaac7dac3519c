"""`lockstep cache`: listing and removing packed weights, kernels and hashes."""

import json
import os

import pytest

from lockstep import user_cache
from lockstep.cli import main
from lockstep.new_files import new_file
from lockstep.weights import packed_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of three models, used 10, 2 and 0 days ago, and of kernels and hashes."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("LOCKSTEP_CACHE", str(folder))
    for name, days in (("old", 10), ("newer", 2), ("new", 0)):
        made = folder / "packed" / name
        made.mkdir(parents=True)
        (made / "w.packed").write_bytes(bytes(1_000_000))
        packed_cache.write_about(made, dict(model=f"/models/{name}", target="avx2"))
        when = (made / packed_cache.ABOUT).stat().st_mtime - days * 86400
        os.utime(made / packed_cache.ABOUT, (when, when))
    for kind in ("kernels", "hashes"):
        (folder / kind / "x").mkdir(parents=True)
        (folder / kind / "x" / "y").write_bytes(bytes(5000))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def listed(capsys):
    assert main(["cache", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def models(capsys):
    return [model["model"].removeprefix("/models/") for model in listed(capsys)["models"]]


def test_the_list_says_what_each_model_takes_and_when_it_was_used(cache, capsys):
    found = listed(capsys)
    assert found["folder"] == str(cache) and found["kernels_bytes"] == 5000 and found["hashes_bytes"] == 5000
    assert 3_000_000 < found["packed_bytes"] < 3_001_000 and found["allowed_bytes"] > 0
    assert [m["target"] for m in found["models"]] == ["avx2"] * 3
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "/models/new " in shown and "10 days ago" in shown and "just now" in shown and "1.0 MB" in shown
    assert "LOCKSTEP_CACHE_GB" in shown and "hub's client" not in shown
    (cache.parent / "hub" / "blobs").mkdir(parents=True)
    (cache.parent / "hub" / "blobs" / "x").write_bytes(bytes(7000))
    assert main(["cache"]) == 0
    assert f"downloads of the hub's client 7 kB in {cache.parent / 'hub'}\n" in capsys.readouterr().out
    assert listed(capsys)["hub_bytes"] == 7000


def test_without_a_folder_nothing_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(user_cache, "_cache_folder", lambda: user_cache.CacheFolder(user_cache.NOWHERE, lasts=False))
    found = listed(capsys)
    assert found["folder"] is None and found["packed_bytes"] == found["allowed_bytes"] == 0
    assert main(["cache"]) == 0 and capsys.readouterr().out.startswith("nothing is kept\n")
    assert main(["cache", "prune", "--all"]) == 0


@pytest.mark.parametrize(
    "options, left",
    [
        ([], ["new", "newer", "old"]),
        (["--older-than", "5"], ["new", "newer"]),
        (["--older-than", "1"], ["new"]),
        (["--max-gb", "0.0021"], ["new", "newer"]),
        (["--max-gb", "0"], []),
        (["--model", "newer"], ["new", "old"]),
        (["--all"], []),
    ],
)
def test_pruning_removes_what_it_is_told_to(options, left, cache, capsys):
    assert main(["cache", "prune", *options]) == 0
    removed = f"removed {3 - len(left)}.0 MB" if len(left) < 3 else "removed 0 kB"
    assert removed in capsys.readouterr().out
    assert models(capsys) == left
    assert (cache / "kernels" / "x").exists() == (options != ["--all"])


def test_names_of_models_are_no_markup_and_move_no_terminal(cache, capsys):
    packed_cache.write_about(cache / "packed" / "new", dict(model="/x[/y]/[red]m", target="avx2"))
    assert main(["cache"]) == 0
    assert "/x[/y]/[red]m" in capsys.readouterr().out


def test_what_killed_processes_left_behind_is_not_listed_and_goes(cache, capsys):
    removed, name = cache / "packed" / ".removed-1-old", ".making-0123456789abcdef"
    left = [cache / "packed" / "new" / name, cache / "kernels" / "x" / name, cache / "hashes" / name]
    scratch = cache / "lockstep-scratch-0123456789abcdef"
    for folder in (removed, scratch):
        folder.mkdir()
    for path in (removed / "w.packed", scratch / "taken", *left):
        path.write_bytes(bytes(1000))
    assert models(capsys) == ["new", "newer", "old"]
    with new_file(cache / "packed" / "new" / "other.packed") as file:
        file.write(b"whole")
        assert main(["cache", "prune"]) == 0
    assert not any(path.exists() for path in (removed, scratch, *left))
    assert (cache / "packed" / "new" / "other.packed").read_bytes() == b"whole", "a process was at work on it"


@pytest.mark.parametrize("size", ["inf", "1e300"])
def test_no_limit_removes_nothing(size, cache, capsys):
    assert main(["cache", "prune", "--max-gb", size]) == 0
    assert "removed 0 kB" in capsys.readouterr().out and len(models(capsys)) == 3


def test_a_part_of_a_name_is_no_empty_text(cache, capsys):
    assert main(["cache", "prune", "--model", ""]) == 2
    assert "--model: expected a part of a model's path, got nothing" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(cache, capsys):
    assert main(["cache", "prune", "--model", "nobody"]) == 2
    said = capsys.readouterr().err
    assert "--model 'nobody': no packed model's path contains it, there are /models/old, /models/newer" in said


def test_two_ways_at_once_are_refused(cache, capsys):
    assert main(["cache", "prune", "--all", "--max-gb", "1"]) == 2
    assert "expected at most one of --older-than" in capsys.readouterr().err


def test_an_empty_cache_is_listed_and_pruned(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "none"))
    assert main(["cache"]) == 0 and main(["cache", "prune", "--all"]) == 0
    assert "removed 0 kB" in capsys.readouterr().out
