"""Resolving names of models: bundled, local, or on the hub, which a local folder stands for here."""

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from lockstep.weights import hub
from lockstep.weights.hub import resolve_model


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Downloads from the hub, which has FILES; they go to tmp_path / "cache", or raise the exception that the test puts
    there."""
    asked, errors = [], []

    def snapshot_download(repo, revision, allow_patterns):
        files = set(filter_repo_objects(FILES[repo], allow_patterns=allow_patterns))
        asked.append((repo, revision, files))
        for file in files:
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / file).write_bytes(b"")
        return str(tmp_path / "cache")

    def model_info(repo, revision=None):
        if errors:
            raise errors[0]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in FILES[repo]])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return asked, errors


FILES = {
    "org/model": ["m-Q4_0.gguf", "m-Q8_0.gguf"],
    "org/one": ["README.md", "mmproj-F16.gguf", "one.gguf"],
    "org/usual": ["m.Q2_K.gguf", "m.Q4_K_M.gguf", "m.Q8_0.gguf"],
    "org/split": [f"Q8_0/m-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)] + ["m-Q4_0.gguf"],
    "org/twins": ["a-Q8_0.gguf", "b-Q8_0.gguf"],
    "org/none": ["a.txt"],
    "org/safe": [
        "config.json",
        "model-00001-of-00002.safetensors",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "1_Pooling/config.json",
        "onnx/config.json",
        "onnx/model.safetensors",
        "consolidated.safetensors",
        "a.bin",
        "additional_chat_templates/notes.txt",
        "2_Dense/model.safetensors",
        "m-Q8_0.gguf",
    ],
    "org/native": [
        "params.json",
        "tekken.json",
        "tokenizer.model.v3",
        "consolidated-00001-of-00001.safetensors",
        "a.bin",
    ],
    "org/meta": ["consolidated.safetensors", "a-Q8_0.gguf"],
    "org/odd": ["[a]*.gguf", "a.gguf"],
    "org/quantless": ["model.safetensors"],
    "org/pickled": ["config.json", "pytorch_model.bin"],
}


def test_local_folders_and_files(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/m.gguf") == tmp_path / "m.gguf"
    with pytest.raises(ValueError, match=r"notes\.txt: expected a model folder, a \.gguf or a \.safetensors file"):
        resolve_model(str(tmp_path / "notes.txt"))


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch, downloads):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model").is_dir() and not downloads[0]


def test_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "lockstep" / "weights" / "hub.py"))
    with pytest.raises(ValueError, match="no model is bundled with this installation"):
        resolve_model(None)
    folder = tmp_path / "lockstep" / "bundled"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve_model(None) == folder


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model",
        "a/b/c",
        "./a/b",
        "/a/b",
        "../b",
        "a/..",
        "a/b:c.txt",
        "a/b:../c.gguf",
        "a b/c",
        "a/b@",
        "a/b:",
        "a[b",
        "https://huggingface.co/a",
        "https://huggingface.co/a/b/wiki/c/d",
        "https://example.org/a/b",
        "hf.co/a/b:../../c.gguf",
        "~nobody/x/y",
        "a\0b",
        "x" * 5000,
        "\ud800",
    ],
)
def test_what_is_no_name(name, tmp_path, monkeypatch, downloads):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder or file"):
        resolve_model(name)
    assert not downloads[0]


def test_which_files_of_a_repository_are_downloaded(tmp_path, downloads):
    assert resolve_model("org/safe") == tmp_path / "cache"
    assert resolve_model("org/safe@refs/pr/1") == tmp_path / "cache"
    assert downloads[0] == [("org/safe", revision, set(FILES["org/safe"][:5])) for revision in (None, "refs/pr/1")]


def test_mistrals_own_form_is_downloaded_where_it_is_the_only_one(tmp_path, downloads):
    assert resolve_model("org/native") == tmp_path / "cache"
    assert resolve_model("org/meta") == tmp_path / "cache" / "a-Q8_0.gguf"
    assert downloads[0] == [("org/native", None, set(FILES["org/native"][:4])), ("org/meta", None, {"a-Q8_0.gguf"})]


def test_a_files_name_is_no_pattern(tmp_path, downloads):
    with pytest.raises(ValueError, match=r"expected org/odd:\[a\]\*\.gguf or org/odd:a\.gguf"):
        resolve_model("org/odd")
    hub.fetched("org/odd", hub.HubName("org/odd"), hub.Repository(FILES["org/odd"]), ["[a]*.gguf"])
    assert downloads[0] == [("org/odd", None, {"[a]*.gguf"})]


@pytest.mark.parametrize(("name", "files"), [
    ("org/model:Q8_0", ["m-Q8_0.gguf"]),
    ("org/model:q4_0", ["m-Q4_0.gguf"]),
    ("hf.co/org/model:Q8_0@v1", ["m-Q8_0.gguf"]),
    ("https://huggingface.co/org/model:Q8_0", ["m-Q8_0.gguf"]),
    ("https://huggingface.co/org/model/blob/v1/m-Q4_0.gguf?show=all", ["m-Q4_0.gguf"]),
    ("org/one", ["one.gguf"]),
    ("https://huggingface.co/org/one/", ["one.gguf"]),
    ("HF.co/org/one/tree/v1", ["one.gguf"]),
    ("org/usual", ["m.Q4_K_M.gguf"]),
    ("org/split:q8_0", [f"Q8_0/m-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]),
])  # fmt: skip
def test_a_quant_of_a_repository(name, files, tmp_path, downloads):
    assert resolve_model(name) == tmp_path / "cache" / files[0]
    [(repo, revision, downloaded)] = downloads[0]
    assert repo in name and downloaded == set(files) and revision == ("v1" if "v1" in name else None)


@pytest.mark.parametrize(("name", "said"), [
    ("org/model", "org/model: GGUF files of several quants; expected org/model:Q4_0 or org/model:Q8_0"),
    ("org/model:Q3", "org/model:Q3: no GGUF file of this quant; expected org/model:Q4_0 or org/model:Q8_0"),
    ("org/usual:F16", "org/usual:F16: no GGUF file of this quant; expected org/usual:Q2_K, org/usual:Q4_K_M or "
     "org/usual:Q8_0"),
    ("org/twins:Q8_0", "org/twins: 2 GGUF files are Q8_0; expected org/twins:a-Q8_0.gguf or org/twins:b-Q8_0.gguf"),
    ("org/none", "org/none: the hub repository org/none has no .safetensors and no GGUF file"),
    ("org/pickled", "org/pickled: the hub repository org/pickled has no .safetensors and no GGUF file, but "
     "pytorch_model.bin: such files may run code when they are read; have them converted to safetensors"),
    ("org/quantless:Q8_0", "org/quantless:Q8_0: the hub repository org/quantless has no GGUF file; org/quantless "
     "without :Q8_0 has .safetensors, which --weights q8_0 can quantize"),
])  # fmt: skip
def test_a_quant_that_is_not_there(name, said, downloads):
    with pytest.raises(ValueError) as raised:
        resolve_model(name)
    assert str(raised.value) == said


def test_a_quant_in_the_cache_needs_no_hub(tmp_path, downloads):
    folder = tmp_path / "home" / ".cache" / "huggingface" / "hub" / "models--org--usual"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    (folder / "snapshots" / "0123" / "m.Q8_0.gguf").write_bytes(b"")
    downloads[1].append(OSError("Name or service not known"))
    assert (
        resolve_model("org/usual:q8_0") == resolve_model("org/usual") == folder / "snapshots" / "0123" / "m.Q8_0.gguf"
    )
    with pytest.raises(
        ValueError, match=r"no GGUF file of this quant; expected org/usual:Q8_0; this is what its cache "
    ):
        resolve_model("org/usual:Q4_0")
    with pytest.raises(ValueError, match=r"has no file x\.gguf; .*the hub cannot be asked: Name or service not known$"):
        resolve_model("org/usual:x.gguf")
    with pytest.raises(ValueError, match=r"Name or service not known; did you mean org/usual:Q8_0\?$"):
        resolve_model("org/usuel:Q8_0")
    with pytest.raises(ValueError, match=r"Name or service not known; did you mean org/usual:Q8_0\?$"):
        resolve_model("org/suual")
    with pytest.raises(ValueError, match=r"usual: no such folder or file.*; did you mean org/usual:Q8_0\?$"):
        resolve_model("usual")


def test_near_names_of_paths(tmp_path):
    (tmp_path / "qwen3-0.6b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"no such folder or file; did you mean .*/qwen3-0\.6b\.gguf\?$"):
        resolve_model(str(tmp_path / "qwen-0.6b.gguf"))


def test_a_gguf_file_of_a_repository(tmp_path, downloads):
    assert resolve_model("org/model:m-Q4_0.gguf@main") == tmp_path / "cache" / "m-Q4_0.gguf"
    assert downloads[0] == [("org/model", "main", {"m-Q4_0.gguf"})]
    with pytest.raises(ValueError, match=r"the hub repository org/model has no file other\.gguf"):
        resolve_model("org/model:other.gguf")


def test_a_full_disk_is_named_with_its_folder_and_what_helps(tmp_path, downloads, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    downloads[1].append(OSError(errno.ENOSPC, "No space left on device", "x.incomplete"))
    said = (
        rf"failed: {tmp_path} cannot be written: No space left on device, .* MB are free\. Free some space there, or "
    )
    with pytest.raises(ValueError, match=said + "set HF_HOME to a folder elsewhere$"):
        resolve_model("org/model")


def test_all_parts_of_a_split_file(tmp_path, downloads):
    parts = FILES["org/split"][:3]
    assert resolve_model(f"org/split:{parts[1]}") == tmp_path / "cache" / parts[0]
    assert downloads[0] == [("org/split", None, set(parts))]
    with pytest.raises(ValueError, match=r"has no file Q8_0/m-Q8_0-00001-of-00004\.gguf"):
        resolve_model("org/split:Q8_0/m-Q8_0-00002-of-00004.gguf")
    with pytest.raises(ValueError, match="expected 1 to 1000 parts"):
        resolve_model("org/split:m-00001-of-99999.gguf")


def test_offline_is_one_clear_sentence(downloads):
    inner, outer = OSError("Name or service not known\nand more"), RuntimeError("a long story")
    outer.__cause__ = inner
    downloads[1].append(outer)
    with pytest.raises(ValueError) as raised:
        resolve_model("org/model")
    assert str(raised.value) == (
        "org/model: no folder or file of that name here, and fetching org/model from the Hugging Face hub failed: "
        "Name or service not known"
    )
    assert raised.value.__suppress_context__
    for error, said in (
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private and needs a login: "),
        (errors.GatedRepoError, "its makers ask for consent on its page, and then for a login: "),
        (errors.RevisionNotFoundError, "it has no such revision"),
    ):
        downloads[1][0] = error("404", response=SimpleNamespace(headers={}, request=None))
        with pytest.raises(ValueError, match=f"the Hugging Face hub failed: {said}"):
            resolve_model("org/model")
    downloads[1][0] = KeyError()
    with pytest.raises(ValueError, match=r"failed: KeyError$"):
        resolve_model("org/model")


def test_a_download_is_reported_as_other_work_is(tmp_path, monkeypatch):
    """Bars as the hub's client makes them: of bytes that are received, of bytes that are written, of files."""

    def snapshot_download(repo, revision, allow_patterns, tqdm_class):
        received, written = (tqdm_class(total=0, unit="B", unit_scale=True, name=name) for name in ("a", "b"))
        for bar in (received, written):
            bar.total = 90
            bar.refresh()
        with tqdm_class(total=3, desc="Fetching 3 files") as files:
            for num_bytes in (30, 60):
                received.update(num_bytes)
                written.update(num_bytes)
                files.update()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    there, told = hub.Repository(["m.gguf"]), []
    hub.fetched("org/m", hub.HubName("org/m"), there, ["m.gguf"], lambda *report: told.append(report))
    assert told == [("downloading", done, 90) for done in (30, 30, 90, 90)]
