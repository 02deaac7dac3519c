"""The context and KV cache that fit in memory: what limits them; memory is not touched before it is used, and no bit
changes."""

import dataclasses

import pytest

from lockstep.engine.cache import size as cache_size
from lockstep.engine.cache.size import ContextSize, context_size, num_pages, request_bytes, weight_bytes
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import load_model
from lockstep.engine.request import SamplingParams
from lockstep.lab.describe import memory as memory_of
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights.store import WeightStore
from tests.models import published, tiny
from tests.models.cases import CASES, case, hybrid, windowed
from tests.models.running import load
from tests.runtime.test_layout import program_of

MANY = 1 << 17
GIB = 1 << 30
CONFIGS = {
    "qwen3": case("qwen3", head_dim=32, max_position_embeddings=MANY),
    "qwen3_5": hybrid(max_position_embeddings=MANY),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with pages only, and one with recurrent states, too; both have many positions."""
    root = tmp_path_factory.mktemp("long")
    return {name: tiny.write(root / name, config, tiny.tensors(config, 1)) for name, config in CONFIGS.items()}


def loaded(folder, max_context=None):
    return load_model(open_checkpoint(folder), WeightStore(), "f32", None, max_context)


def page_bytes(model):
    return sum(c.bytes_each for c in model.recorded.caches if c.kind == "pages")


def state_bytes(model):
    return sum(c.bytes_each for c in model.recorded.caches if c.kind == "state")


@pytest.fixture
def memory(monkeypatch):
    """Sets how much memory is free."""
    return lambda num_bytes: monkeypatch.setattr(cache_size, "available_bytes", lambda: num_bytes)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_context_is_what_half_of_the_free_memory_holds_beside_weights_and_states(name, folders, memory):
    model, options = loaded(folders[name]), EngineOptions(max_requests=4, state_bytes=3 << 20)
    states = 4 * state_bytes(model) + (3 << 20) * (name == "qwen3_5")
    for pages in (64, 65, 1000, 2047):
        memory(weight_bytes(model.recorded) + 2 * (states + pages * page_bytes(model)))
        assert context_size(model, options) == ContextSize(64 * pages, "memory")
        fitting = dataclasses.replace(model, max_context=64 * pages)
        assert num_pages(fitting, options) == pages
        assert num_pages(dataclasses.replace(model, max_context=64 * 10), options) == min(pages, 40)
    memory(weight_bytes(model.recorded) + 2 * (states + 2048 * page_bytes(model)))
    assert context_size(model, options) == ContextSize(MANY)


@pytest.mark.parametrize("window", [512, 1024])
def test_layers_with_a_window_take_memory_for_it_and_for_a_step(window, tmp_path, memory):
    """Five of six layers have a window, at 32,768 tokens."""
    raw = windowed(num_hidden_layers=6, sliding_window=window, sliding_window_pattern=6, max_position_embeddings=MANY)
    folder = tiny.write(tmp_path / "m", raw, tiny.tensors(raw, 1))
    model, options = loaded(folder, 32768), EngineOptions(max_requests=1, kv_tokens=32768, threads=1)
    engine = Engine(model, options)
    taken = sum(array.nbytes for array in engine.runner.caches.values())
    engine.close()
    counted = page_bytes(model) // 64 // 6 * (32768 + 5 * (window + 512))
    assert counted <= taken < 1.01 * counted and taken < 0.21 * 512 * page_bytes(model)
    assert cache_size.cache_bytes(cache_size.needs(model, options), 512, options) == taken
    memory(weight_bytes(model.recorded) + 2 * taken)
    assert context_size(loaded(folder), dataclasses.replace(options, kv_tokens=None)) == ContextSize(32768, "memory")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("draft", [None, 1, 15])
def test_what_forgets_drafts_is_counted_for_each_request(name, draft, folders, memory):
    model = loaded(folders[name], 64 * 40)
    options = EngineOptions(max_requests=4, prefix_cache=False, speculate="lookup", draft=draft, threads=1)
    engine = Engine(model, options)
    beside_pages = sum(a.nbytes for n, a in engine.runner.caches.items() if not n.endswith("_pages"))
    engine.close()
    assert beside_pages == 4 * request_bytes(model.recorded, draft or 7)
    assert (beside_pages > 4 * state_bytes(model)) == (name == "qwen3_5")
    memory(weight_bytes(model.recorded) + 2 * (beside_pages + 100 * page_bytes(model)))
    assert context_size(loaded(folders[name]), options) == ContextSize(64 * 100, "memory")
    assert num_pages(dataclasses.replace(model, max_context=64 * 30), options) == 100


@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_what_requests_take_beside_kv_tokens_is_said(speculate, folders, monkeypatch):
    model = loaded(folders["qwen3_5"])
    options = EngineOptions(max_requests=4, kv_tokens=64 * 500, speculate=speculate)
    beside = 4 * request_bytes(model.recorded, options.num_drafts)
    monkeypatch.setattr(cache_size, "_physical_bytes", lambda: beside + 500 * page_bytes(model))
    assert num_pages(model, options) == 500
    message = rf"kv_tokens: 32001 tokens .* of which 4 requests take {beside / 2**30:.1f}, enough for 32000"
    with pytest.raises(ValueError, match=message):
        num_pages(model, dataclasses.replace(options, kv_tokens=32001))


def test_seven_drafts_take_at_most_40_percent_of_a_state():
    program = program_of(published.QWEN3_5_0_8B)
    assert 0 < request_bytes(program, 7) - request_bytes(program, 0) <= 0.4 * request_bytes(program, 0)


def test_little_memory_leaves_a_context_that_only_takes_what_is_used(folders, memory):
    model = loaded(folders["qwen3"])
    memory(0)
    assert context_size(model, EngineOptions()) == ContextSize(4096, "memory")
    assert num_pages(dataclasses.replace(model, max_context=4096), EngineOptions(max_requests=3)) == 64


def test_what_a_user_chose_comes_before_memory(folders, memory):
    memory(0)
    assert context_size(loaded(folders["qwen3"]), EngineOptions(kv_tokens=1000)) == ContextSize(1024, "kv_tokens")
    assert context_size(loaded(folders["qwen3"]), EngineOptions(kv_tokens=2 * MANY)) == ContextSize(MANY)
    chosen = loaded(folders["qwen3"], 5000)
    assert context_size(chosen, EngineOptions(), 5000) == ContextSize(5000, "max_context")
    assert num_pages(chosen, EngineOptions()) == 79
    assert context_size(loaded(folders["qwen3"], 2 * MANY), EngineOptions(), 2 * MANY) == ContextSize(MANY)


@pytest.mark.parametrize(
    ("max_context", "kv_tokens", "expected"),
    [
        (5000, 300, ContextSize(320, "kv_tokens")),
        (5000, 6000, ContextSize(5000, "max_context")),
        (320, 300, ContextSize(320, "max_context")),
        (300, 300, ContextSize(300, "max_context")),
        (2 * MANY, 300, ContextSize(320, "kv_tokens")),
        (2 * MANY, 2 * MANY, ContextSize(MANY)),
    ],
)
def test_of_two_choices_the_smaller_one_counts(max_context, kv_tokens, expected, folders, memory):
    memory(0)
    model = loaded(folders["qwen3"], max_context)
    assert context_size(model, EngineOptions(kv_tokens=kv_tokens), max_context) == expected


@pytest.mark.parametrize(
    ("max_context", "expected"),
    [
        (None, ContextSize(1 << 20, "positions")),
        (1 << 30, ContextSize(1 << 22)),
        (1 << 21, ContextSize(1 << 21, "max_context")),
        (4096, ContextSize(4096, "max_context")),
    ],
)
def test_more_positions_than_have_a_proven_accuracy_must_be_asked_for(max_context, expected, folders, memory):
    memory(1 << 50)
    model = loaded(folders["qwen3"])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, max_positions=1 << 22))
    assert context_size(model, EngineOptions(), max_context) == expected


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "q8"])
def test_a_smaller_cache_holds_more(kv_dtype, folders, memory):
    model = load(folders["qwen3"], "f32", kv_dtype, MANY)
    memory(weight_bytes(model.recorded) + 200 * page_bytes(loaded(folders["qwen3"])))
    expected = {"f32": 100, "bf16": 200, "q8": 100 * 128 // 34}[kv_dtype]  # q8: 32 numbers and a scale of 2 bytes
    assert context_size(model, EngineOptions()).num_tokens == 64 * expected


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])  # of qwen2 the head is the table
def test_weights_are_counted_as_they_are_in_memory(name, weights, tmp_path):
    config = CASES[name]
    program = load(tiny.write(tmp_path / "m", config, tiny.tensors(config, 1)), weights).recorded
    shown = memory_of(program)
    taken = shown["packed_weights"] + shown["embedding"] + shown["constants"]
    assert abs(weight_bytes(program) - taken) <= 0.03 * taken  # panels are padded


# ------------------------------------------------------------ nothing is touched, no bit changes


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) << 12


@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_context_takes_no_memory_before_it_is_used(name, folders, memory):
    memory(1 << 40)
    short = Engine(loaded(folders[name], 64), EngineOptions(max_requests=1, threads=1, prefix_cache=False))
    before = resident()
    long = Engine(loaded(folders[name]), EngineOptions(max_requests=16, threads=1, prefix_cache=False))
    reserved = sum(array.nbytes for array in long.runner.caches.values())
    assert long.runner.limits.num_pages >= MANY // 64 and GIB // 2 < reserved <= 2 * GIB
    assert resident() - before < 64 << 20
    for made in (short, long):
        made.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_answer_is_the_same_whatever_the_context(name, folders):
    prompt = [3 + i * i % 90 for i in range(500)]  # rope tables go on within the answer
    params = SamplingParams(max_tokens=40, temperature=0.9, seed=5, ignore_eos=True, logprobs=2)
    found = []
    for max_context in (540, 600, 4096, MANY):
        engine = Engine(loaded(folders[name], max_context), EngineOptions(max_requests=2, threads=1))
        request = engine.add(prompt, params)
        while engine.has_work:
            engine.step()
        found.append((request.output_ids, request.logprobs, request.top_logprobs))
        engine.close()
    assert len(found[0][0]) == 40 and found == [found[0]] * 4


# ------------------------------------------------------------ what the machine says


def test_limits_of_control_groups_and_of_address_space_are_heeded(tmp_path, monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB",
        "/proc/self/cgroup": "0::/a/b",
        "/proc/sys/vm/overcommit_memory": "0",
    }
    monkeypatch.setattr(cache_size, "CGROUPS", tmp_path)
    real = cache_size.file_text
    monkeypatch.setattr(cache_size, "file_text", lambda path: files.get(str(path)) or real(path))
    monkeypatch.setattr(cache_size, "_address_bytes", lambda: iter(()))
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert cache_size.available_bytes() == 8000 << 10
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    (tmp_path / "a" / "b" / "memory.current").write_text("100\n")
    (tmp_path / "a" / "memory.max").write_text("5000000\n")
    (tmp_path / "a" / "memory.current").write_text("3000000\n")
    (tmp_path / "a" / "memory.stat").write_text("anon 5\ninactive_file 1000000\n")
    assert cache_size.available_bytes() == 3000000
    files["/proc/sys/vm/overcommit_memory"] = "2"
    files["/proc/meminfo"] += "\nCommitLimit: 3000 kB\nCommitted_AS: 1000 kB"
    assert cache_size.available_bytes() == 2000 << 10
    monkeypatch.setattr(cache_size, "_address_bytes", lambda: iter([-5]))
    assert cache_size.available_bytes() == 0


def test_the_first_version_of_control_groups_is_known(tmp_path, monkeypatch):
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("4000000")
    (folder / "memory.usage_in_bytes").write_text("1000000")
    monkeypatch.setattr(cache_size, "CGROUPS", tmp_path)
    real = cache_size.file_text
    given = "9:name=systemd:/\n4:memory:/job\n0::/"
    monkeypatch.setattr(cache_size, "file_text", lambda path: given if path == "/proc/self/cgroup" else real(path))
    assert cache_size.available_bytes() == 3000000


def test_this_machine_has_memory():
    assert 0 < cache_size.available_bytes() < 1 << 50
