"""`lockstep list`: the models on this disk, what to type for each, and which of them can be run."""

import json
import re
import shutil

import numpy as np
import pytest

from lockstep.cli import main
from lockstep.commands import list as listing
from lockstep.weights import packed_cache
from lockstep.weights.hub import resolve_model
from lockstep.weights.sources import ollama
from tests.weights.gguf.gguf_models import dense_tensors, write_dense

DIGEST = "cd" * 32
# heads of 16 numbers, which the kernels can take, in the shapes of dense_tensors
HEADS = dict(attention__head_count=2, attention__head_count_kv=1, rope__dimension_count=16)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A disk with models of every source: the bundled one as one of the hub's, and a GGUF file without a tokenizer."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ollama, "USUAL", (ollama.USUAL[0], str(tmp_path / "none")))
    (tmp_path / "lockstep").mkdir(mode=0o700)
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "lockstep"))

    hub = tmp_path / ".cache" / "huggingface" / "hub" / "models--org--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("1" * 40)
    shutil.copytree(resolve_model(None), hub / "snapshots" / ("1" * 40))

    studio = tmp_path / ".lmstudio" / "models" / "maker" / "tiny"
    studio.mkdir(parents=True)
    write_dense(studio / "tiny-F16.gguf", dense_tensors(np.random.default_rng(0)), "llama", **HEADS)

    store = tmp_path / ".ollama" / "models"
    for tag, digest in (("latest", f"sha256:{DIGEST}"), ("bad", "sha256:../x")):
        manifest = store / "manifests" / "registry.host" / "library" / "tiny" / tag
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps(dict(layers=[dict(mediaType=ollama.MODEL, digest=digest)])))
    (store / "blobs").mkdir()
    (store / "blobs" / f"sha256-{DIGEST}").write_bytes((studio / "tiny-F16.gguf").read_bytes()[:3000])
    return tmp_path


def listed(capsys, *args):
    assert main(["list", "--json", *args]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_text_that_no_name_has(home, capsys):
    assert main(["list", "zzz"]) == 0
    said = "lockstep: 5 models on this disk, none with 'zzz' in the name (lockstep list shows all)\n"
    assert capsys.readouterr() == ("", said)
    assert listed(capsys, "zzz") == {}


def test_what_is_on_the_disk_and_what_can_be_run(home, capsys):
    rows = listed(capsys)
    assert list(rows) == [None, "org/model", "ollama:tiny:bad", "ollama:tiny:latest", "lmstudio:maker/tiny"]
    assert [row["source"] for row in rows.values()] == [
        "bundled", "Hugging Face cache", "Ollama", "Ollama", "LM Studio"
    ]  # fmt: skip
    assert [row["runs"] for row in rows.values()] == [True, True, False, False, True]
    assert rows["org/model"]["format"] == rows[None]["format"] == "bf16"
    assert rows["org/model"]["num_bytes"] == rows[None]["num_bytes"] > 10_000_000
    assert rows["org/model"]["reason"] is None
    assert rows["ollama:tiny:bad"]["reason"].startswith("its manifest names no digest")
    assert "of 3000 bytes of the file: the file is cut off" in rows["ollama:tiny:latest"]["reason"]
    assert not rows["ollama:tiny:latest"]["reason"].startswith("/")
    assert rows["lmstudio:maker/tiny"]["reason"] == "it has no tokenizer"
    assert {row["name"]: row["only"] for row in rows.values() if row["only"]} == {"lmstudio:maker/tiny": "token ids"}
    for name, row in rows.items():
        assert not row["runs"] or str(resolve_model(name)) == row["path"]


def test_the_table(home, capsys):
    assert main(["list", "--no-check"]) == 0
    out = capsys.readouterr().out
    assert "(without MODEL)" in out and "lmstudio:maker/tiny" in out and "Hugging Face cache" in out
    assert "no: its manifest names no digest" in out and "5 models, " in out
    assert main(["list", "ORG/"]) == 0
    out = capsys.readouterr().out
    assert "org/model" in out and "tiny" not in out
    assert re.search(r"^1 model, [\d.]+ MB; for example: lockstep generate org/model -p Hello$", out, re.MULTILINE)


@pytest.mark.parametrize(("text", "example"), [
    ("", "; for example: lockstep generate org/model -p Hello"),
    ("bundled", "; for example: lockstep generate -p Hello"),
    ("lmstudio", ""),
    ("bad", ""),
])  # fmt: skip
def test_the_example_runs_a_model_of_the_list(text, example, home, capsys):
    assert main(["list", text]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^\d models?, [\d.]+ (MB|kB){example}$", out, re.MULTILINE)
    assert ("token ids only: it has no tokenizer" in out) == (text in ("", "lmstudio"))


def test_models_that_were_run_before(home, capsys):
    elsewhere = home / "venv" / "lockstep" / "bundled"  # of another installation
    for folder in (home / "own", elsewhere):
        folder.mkdir(parents=True)
        shutil.copy(resolve_model(None) / "config.json", folder)
    for name, path in dict(a=home / "own", b=home / "gone", c=resolve_model(None), d=elsewhere).items():
        (home / "lockstep" / "packed" / name).mkdir(parents=True)
        packed_cache.write_about(home / "lockstep" / "packed" / name, dict(model=str(path), target="avx2"))
    rows = listed(capsys)
    assert [name for name, row in rows.items() if row["packed"]] == [None, str(home / "own")]
    assert rows[str(home / "own")]["source"] == "run before" and not rows[str(home / "own")]["runs"]
    assert not {str(home / "gone"), str(elsewhere)} & rows.keys()


def test_a_folder_that_cannot_be_read_is_named(home, capsys):
    (home / ".cache" / "lm-studio").mkdir()
    (home / ".cache" / "lm-studio" / "models").mkdir()
    (home / ".cache" / "lm-studio" / "models" / "loop").symlink_to("loop")  # leads to itself
    assert len(listed(capsys, "--no-check")) == 5
    assert main(["list", "--no-check"]) == 0
    assert "models/loop: Too many levels of symbolic links: what is there is not listed" in capsys.readouterr().err


def test_whatever_is_wrong_with_a_model_the_others_are_listed(home, capsys, monkeypatch):
    from lockstep.models import checkpoint

    def fail(path):
        raise (
            KeyError("two\nlines") if "snapshots" in str(path) else PermissionError(13, "Permission denied", str(path))
        )

    monkeypatch.setattr(checkpoint, "open_checkpoint", fail)
    rows = listed(capsys)
    assert rows["org/model"]["reason"] == r"KeyError: 'two\nlines'" and rows[None]["reason"] == "Permission denied"


def test_a_model_that_memory_cannot_hold_cannot_be_run():
    assert listing.lacking_memory(10**6) is None
    assert listing.lacking_memory(10**15).startswith("its weights take 1000000.0 GB of memory, this machine has ")
