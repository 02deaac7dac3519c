"""Models that other programs have put on the disk: Ollama's store, LM Studio's folders, and the choice of a quant."""

import json

import pytest

from lockstep.weights.hub import resolve_model
from lockstep.weights.sources import hub_cache, lm_studio, ollama, quants

HEX = "ab" * 32
WEIGHTS = b"GGUF and weights"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder without any model."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ollama, "USUAL", (ollama.USUAL[0], str(tmp_path / "of the service")))
    return tmp_path


def layer(kind="model", digest=f"sha256:{HEX}", size=16):
    return dict(mediaType=f"application/vnd.ollama.image.{kind}", digest=digest, size=size)


def put(store, name, *layers, blob=WEIGHTS, folder="manifests"):
    """Puts a manifest, and its blob, into a store."""
    path = store / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(schemaVersion=2, layers=layers or [layer("license"), layer(), layer("params")])))
    (store / "blobs").mkdir(exist_ok=True)
    if blob is not None:
        (store / "blobs" / f"sha256-{HEX}").write_bytes(blob)
    return path


# ------------------------------------------------------------ Ollama


@pytest.mark.parametrize(
    "name", ["small", "small:latest", "Small:LATEST", "library/small", "registry.host/library/small"]
)
def test_a_model_of_ollama(name, home):
    store = home / ".ollama" / "models"
    put(store, "registry.host/library/small/latest")
    assert resolve_model(f"ollama:{name}") == store / "blobs" / f"sha256-{HEX}"


def test_names_are_those_that_ollama_shows(home, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "else where"))
    for name in ("registry.host/library/small/1b-q8_0", "registry.host/me/mine/latest", "hf.co/org/model/Q4_K_M"):
        put(home / "else where", name)
    put(home / "of the service", "registry.host/library/big/latest", folder="manifests-v2")
    names = [model.name.removeprefix("ollama:") for model in ollama.found(pytest.fail)]
    assert names == ["hf.co/org/model:Q4_K_M", "small:1b-q8_0", "me/mine:latest", "big:latest"]
    for name in names:
        assert resolve_model(f"ollama:{name}").read_bytes() == WEIGHTS
    with pytest.raises(ValueError, match="ollama:mine: no such model in Ollama's store; there is none of that name"):
        resolve_model("ollama:mine")
    with pytest.raises(ValueError, match=r"ollama:small: no such model .* there is ollama:small:1b-q8_0; did you"):
        resolve_model("ollama:small")
    with pytest.raises(ValueError, match=r"smal: no such folder or file.*did you mean ollama:small:1b-q8_0\?"):
        resolve_model("smal")


@pytest.mark.parametrize(
    "name", ["", "a:b:c", "../x", "a/../../x", "a/b/c/d", ".hidden", "a:../b", "/etc/passwd", "a//b"]
)
def test_what_is_no_name_of_ollama(name):
    with pytest.raises(ValueError, match="expected ollama:NAME, ollama:NAME:TAG or ollama:NAMESPACE/NAME:TAG"):
        resolve_model(f"ollama:{name}")


@pytest.mark.parametrize(("layers", "blob", "said"), [
    ([layer(digest="sha256:../../../secret")], WEIGHTS, "names no digest, sha256:..., but 'sha256:../../../secret'"),
    ([layer(digest=None)], WEIGHTS, "names no digest"),
    ([layer()], None, f"its weights are missing: pull the model again .*/sha256-{HEX}"),
    ([layer()], WEIGHTS[:9], "its weights have 9 bytes, not 16: pull the model again"),
    ([layer("params")], WEIGHTS, "it has no weights: it runs elsewhere"),
    ([layer(), layer()], WEIGHTS, "it has 2 files of weights, not one"),
    ([layer(), layer("adapter")], WEIGHTS, r"it has an adapter \(LoRA\): only weights in one GGUF file are supported"),
    ([layer("tensor; name=x")], WEIGHTS, "it has tensors in files of their own: only"),
    (["model"], WEIGHTS, "has no list of layers"),
])  # fmt: skip
def test_a_wrong_manifest_is_one_sentence(layers, blob, said, home):
    put(home / ".ollama" / "models", "registry.host/library/m/latest", *layers, blob=blob)
    with pytest.raises(ValueError, match=f"^ollama:m:latest: .*{said}"):
        resolve_model("ollama:m")
    [model] = ollama.found(pytest.fail)
    assert model.name == "ollama:m:latest" and not model.problem.startswith("ollama:")


@pytest.mark.parametrize(("content", "said"), [
    ("{", "not valid JSON"),
    ("[]", "expected a JSON object"),
    ("{}", "no list of layers"),
    ("[" * 5000, "not valid|deep"),
])  # fmt: skip
def test_a_damaged_manifest_is_named(content, said, home):
    path = put(home / ".ollama" / "models", "registry.host/library/m/latest")
    path.write_text(content)
    with pytest.raises(ValueError, match=f"ollama:m:latest: its manifest.*({said}).*{path}"):
        resolve_model("ollama:m")
    path.write_bytes(b"{" + b" " * (5 << 20) + b"}")
    with pytest.raises(ValueError, match="at most 4194304 are allowed"):
        resolve_model("ollama:m")


def test_what_leads_out_of_the_store_is_refused(home):
    store = home / ".ollama" / "models"
    path = put(store, "registry.host/library/m/latest", blob=None)
    (home / "secret.gguf").write_bytes(WEIGHTS)
    (store / "blobs" / f"sha256-{HEX}").symlink_to(home / "secret.gguf")
    with pytest.raises(ValueError, match=r"leads out of Ollama's store, to .*secret\.gguf; name that file itself"):
        resolve_model("ollama:m")
    path.rename(home / "manifest")
    path.symlink_to(home / "manifest")
    with pytest.raises(ValueError, match=r"it leads out of Ollama's store, to .*/manifest;"):
        resolve_model("ollama:m")


def test_a_store_may_be_a_link_to_another_disk(home):
    put(home / "disk", "registry.host/library/m/latest")
    (home / ".ollama").mkdir()
    (home / ".ollama" / "models").symlink_to(home / "disk")
    assert resolve_model("ollama:m").read_bytes() == WEIGHTS


def test_a_store_that_cannot_be_read_is_named(home):
    (home / "of the service").mkdir()
    (home / "of the service" / "manifests").symlink_to("manifests")  # leads to itself
    with pytest.raises(ValueError, match="of the service/manifests cannot be read: Too many levels of symbolic links"):
        resolve_model("ollama:m")
    put(home / ".ollama" / "models", "registry.host/library/m/latest")
    assert resolve_model("ollama:m").read_bytes() == WEIGHTS


# ------------------------------------------------------------ LM Studio


def test_models_of_lm_studio(home):
    folder = home / ".lmstudio" / "models" / "maker" / "Model-GGUF"
    folder.mkdir(parents=True)
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-f16.gguf"):
        (folder / name).write_bytes(WEIGHTS)
    other = home / ".cache" / "lm-studio" / "models" / "maker" / "mlx"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(WEIGHTS)
    names = [model.name for model in lm_studio.found(pytest.fail)]
    assert names == ["lmstudio:maker/Model-GGUF:Q4_K_M", "lmstudio:maker/Model-GGUF:Q8_0", "lmstudio:maker/mlx"]
    paths = [folder / "m-Q4_K_M.gguf", folder / "m-Q8_0.gguf", other]
    assert [resolve_model(name) for name in names] == paths
    assert resolve_model("lmstudio:Maker/model-gguf") == paths[0]
    assert resolve_model("lmstudio:maker/Model-GGUF/m-Q8_0.gguf") == paths[1]
    for name, said in {
        "maker/none": "no such model of LM Studio",
        "maker/Model-GGUF:Q2_K": "no GGUF file of this quant; expected lmstudio:maker/Model-GGUF:Q4_K_M or lmstudio:",
        "maker/Model-GGUF/x.gguf": "has no file x.gguf",
        "maker/../../x": "expected lmstudio:publisher/repository",
        "maker": "expected lmstudio:publisher/repository",
    }.items():
        with pytest.raises(ValueError, match=said):
            resolve_model(f"lmstudio:{name}")


# ------------------------------------------------------------ the hub's cache


def test_models_in_the_cache_of_the_hub(home):
    folder = home / ".cache" / "huggingface" / "hub" / "models--org--model"
    for commit, file in (("1" * 40, "model.safetensors"), ("2" * 40, "m-Q8_0.gguf"), ("3" * 40, "config.json")):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / file).write_bytes(WEIGHTS)
    (folder / "refs" / "refs" / "pr").mkdir(parents=True)
    (folder / "refs" / "main").write_text("1" * 40)
    (folder / "refs" / "refs" / "pr" / "1").write_text("2" * 40)
    found = list(hub_cache.found(pytest.fail))
    assert [model.name for model in found] == ["org/model", "org/model:Q8_0@refs/pr/1", f"org/model@{'3' * 40}"]
    assert [model.num_bytes for model in found] == [16, 16, 0] and "no .safetensors" in found[2].problem
    assert hub_cache.snapshot("org/model", None) == folder / "snapshots" / ("1" * 40)
    assert hub_cache.snapshot("org/model", "refs/pr/1") == hub_cache.snapshot("org/model", "2" * 40)
    (folder / "refs" / "main").write_text("../../elsewhere")
    assert hub_cache.snapshot("org/model", None) is None


def test_a_strange_cache_is_listed_too(home):
    hub = home / ".cache" / "huggingface" / "hub"
    folder = hub / "models--gpt2" / "snapshots" / "4"
    folder.mkdir(parents=True)
    for name in ("a b.gguf", "c-Q8_0-00002-of-00003.gguf", "d-00001-of-99999.gguf"):
        (folder / name).write_bytes(WEIGHTS)
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    (hub / "models--gpt2" / "refs").mkdir()
    (hub / "models--gpt2" / "refs" / "main").write_bytes(b"\xff\0")
    (hub / "models--gpt2" / "refs" / "loop").symlink_to("loop")
    (hub / "models--file").write_bytes(b"")
    (hub / "datasets--org--data").mkdir()
    found = {model.name: model.num_bytes for model in hub_cache.found(pytest.fail)}
    names = ["", "/a b.gguf", "/c-Q8_0-00002-of-00003.gguf", "/d-00001-of-99999.gguf"]
    assert found == dict(zip((f"{folder}{name}" for name in names), (0, 16, 16, 16), strict=True))
    with pytest.raises(ValueError, match="hpt2: no such folder or file"):
        resolve_model("hpt2")


# ------------------------------------------------------------ quants


@pytest.mark.parametrize(("file", "quant"), [
    ("Qwen3-0.6B-Q8_0.gguf", "Q8_0"),
    ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "q4_k_m"),
    ("llama-2-7b.Q4_K_M.gguf", "Q4_K_M"),
    ("model-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
    ("m.i1-IQ4_XS.gguf", "IQ4_XS"),
    ("Phi-3-mini-4k-instruct-fp16.gguf", "fp16"),
    ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
    ("BF16/m-BF16-00001-of-00002.gguf", "BF16"),
    ("Q8_0/m-00001-of-00002.gguf", "Q8_0"),
    ("gemma-3-1b-it-qat-q4_0-v2.gguf", "q4_0"),
    ("plain.gguf", None),
    ("seq8.gguf", None),
])  # fmt: skip
def test_the_quant_in_a_name(file, quant):
    assert quants.quant_of(file) == quant


def test_a_makers_prefix_counts_only_where_it_is_needed():
    assert quants.choose(["m-UD-Q4_K_M.gguf", "m-Q8_0.gguf"], "q4_k_m", "x") == "m-UD-Q4_K_M.gguf"
    assert quants.choose(["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"], "Q4_K_M", "x") == "m-Q4_K_M.gguf"
    assert quants.choose(["m.i1-Q4_K_M.gguf", "n-Q8_0.gguf"], "i1-Q4_K_M", "x") == "m.i1-Q4_K_M.gguf"


def test_a_long_list_of_quants_is_cut():
    with pytest.raises(ValueError, match=r"x:a0-Q8_0\.gguf, .* or 960 more$") as raised:
        quants.choose([f"a{i}-Q8_0.gguf" for i in range(1000)], "Q2_K", "x")
    assert len(str(raised.value)) < 1500
