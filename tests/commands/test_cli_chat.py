"""`lockstep chat` and `lockstep inspect`."""

import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest

from lockstep import LLM, SamplingParams
from lockstep.cli import main
from lockstep.commands.inspect import mtp_program, spans
from lockstep.commands.options import context_words
from lockstep.commands.terminal import printer
from lockstep.commands.terminal.conversation import COMMANDS, Conversation
from lockstep.engine.cache import size as cache_size
from lockstep.engine.cache.size import ContextSize, needs, request_bytes
from lockstep.engine.engine import EngineOptions
from lockstep.lab.describe import collapsed, memory, op_costs, packed_bytes
from lockstep.ops.attention.attention import Attention
from lockstep.ops.linear.linear import Linear
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import WeightStore
from tests.commands.test_cli import Output
from tests.models import tiny
from tests.models.cases import CASES as FAMILY_CASES

SETTINGS = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm():
    made = LLM(max_requests=1, threads=1)
    yield made
    made.close()


@pytest.fixture
def talk(llm):
    return Conversation(llm, SETTINGS, "Be brief.")


def test_turns_add_up(talk, llm):
    talk.hear("hello")
    talk.hear("and now?")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    again = llm.generate([llm.chat_prompt(talk.messages[:-1])], SamplingParams(**SETTINGS))[0]
    assert talk.messages[-1]["content"] == again.text


def test_ctrl_c_ends_the_answer_only(talk, monkeypatch, capsys):
    shown = []

    def write(text):
        shown.append(text)
        if len(shown) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(printer, "write", write)
    talk.settings["max_tokens"] = 1000
    talk.hear("hello")
    monkeypatch.undo()
    assert "interrupted" in capsys.readouterr().err and len(shown) == 2 and talk.open
    assert talk.messages[-1] == dict(role="assistant", content=shown[0])
    talk.settings["max_tokens"] = 8
    talk.hear("go on")
    assert len(talk.messages) == 5 and not talk.llm.engine.has_work


def test_commands(talk, tmp_path, capsys):
    path = tmp_path / "talk.json"
    for line in ("hello", f"/save {path}", "/reset"):
        talk.hear(line)
    assert [m["role"] for m in talk.messages] == ["system"]
    talk.hear(f"/load {path}")
    assert len(talk.messages) == 3 and talk.messages == json.loads(path.read_text())
    talk.hear("/system Be long.")
    assert talk.messages == [dict(role="system", content="Be long.")]
    talk.hear("/system")
    assert talk.messages == []
    talk.hear("/set temperature 0.5")
    talk.hear("/set top_k 3")
    assert talk.settings == {**SETTINGS, "temperature": 0.5, "top_k": 3}
    capsys.readouterr()
    talk.hear("/help")
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} >= {f"/{names[0]}" for names, *_ in COMMANDS}
    assert len({len(line) - len(line.partition("  ")[2].lstrip()) for line in listed}) == 1  # one column of texts
    talk.hear("/exit")
    assert not talk.open


@pytest.mark.parametrize(("line", "said"), [
    ("/nothing", "/nothing: no such command"), ("/", "no such command"), ("/regen", "did you mean /regenerate?"),
    ("/regenerate", "no question to answer again"), ("/undo", "nothing to undo"), ("/think", "knows no thinking"),
    ("/set speed 9", "no such setting"), ("/set seed x", "expected a number"),
    ("/set top_p 7", "top_p: expected a number from"), ("/save", "expected a"),
    ("/load /nowhere/x", "/nowhere/x: No such file"), ("/load {bad}", "expected a list of messages"),
    ("/load /etc/passwd", "/etc/passwd: expected messages as /save writes them, this is not JSON"),
    ("x " * 9000, "tokens, which leave no room for an answer in the context of 4096: shorten it)"),
    ("\udc80", "surrogate"),
])  # fmt: skip
def test_a_mistake_changes_nothing(line, said, talk, tmp_path, capsys):
    (tmp_path / "bad.json").write_text('[{"role": "system"}]')
    before = list(talk.messages), dict(talk.settings)
    talk.hear(line.replace("{bad}", str(tmp_path / "bad.json")))
    assert said in capsys.readouterr().err
    assert (talk.messages, talk.settings) == before and talk.open


def test_a_full_conversation_can_be_reset_but_a_long_question_cannot(talk, monkeypatch, capsys):
    talk.hear("hello")
    capsys.readouterr()
    talk.hear("x " * 9000)
    said = capsys.readouterr().err
    assert said.startswith("(the conversation has ") and said.endswith("in the context of 4096: /reset it)\n")
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "-p", "x " * 9000]) == 2
    said = capsys.readouterr().err
    assert "lockstep: the question with its template has " in said and "reset" not in said


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "(not enough memory)"), (RuntimeError("can't start new thread"), "(no thread can be started: ")],
)
def test_a_lack_of_memory_ends_no_conversation(error, said, talk, monkeypatch, capsys):
    def fail(*args, **options):
        raise error

    before = list(talk.messages)
    monkeypatch.setattr(talk.llm, "start", fail)
    talk.hear("hello")
    assert capsys.readouterr().err.startswith(said) and talk.messages == before and talk.open


def test_piped(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Output(b"/set\nhello\n/exit\nnever\n"))
    assert main(["chat", "-n", "5", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("temperature 0.0") and "decode 5 tokens" in err


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_model_that_cannot_chat_is_refused_before_anything_is_packed(tokenizer, tmp_path, monkeypatch, capsys):
    bundled = resolve_model(None)
    shutil.copytree(bundled, tmp_path / "base", ignore=None if tokenizer else shutil.ignore_patterns("tokenizer*"))
    settings = tmp_path / "base" / "tokenizer_config.json"
    if tokenizer:
        known = json.loads(settings.read_text())
        del known["chat_template"]
        settings.write_text(json.dumps(known))
    packed = []
    monkeypatch.setattr(WeightStore, "make", lambda *args: packed.append(args))
    assert main(["chat", str(tmp_path / "base")]) == 2
    said = "base: has no chat template" if tokenizer else "base: has no tokenizer.json, tekken.json or tokenizer.model"
    assert f"{tmp_path}/{said}" in capsys.readouterr().err and not packed


class Packed(Exception):
    """Something is packed."""


def test_a_missing_tokenizer_is_noticed_before_anything_is_packed(tmp_path, monkeypatch, capsys, caplog):
    model = shutil.copytree(resolve_model(None), tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer.json"))
    monkeypatch.setattr(WeightStore, "make", lambda *args: (_ for _ in ()).throw(Packed))
    assert main(["generate", str(model), "-p", "x"]) == 2
    assert (
        f"{model}: has no tokenizer.json, tekken.json or tokenizer.model" in capsys.readouterr().err
        and not caplog.records
    )
    with pytest.raises(Packed):  # prompts may be token ids
        LLM(str(model))
    [record] = caplog.records
    assert record.message == (
        f"{model} has no tokenizer that can be used: prompts must be token ids, and answers have no text"
    )


@pytest.mark.parametrize(
    ("size", "kv_dtype", "words"),
    [
        (ContextSize(4096), "bf16", ("context 4096 tokens", None)),
        (ContextSize(640, "max_context"), "bf16", ("context 640 of the model's 4096 tokens", None)),
        (
            ContextSize(1024, "kv_tokens"),
            "bf16",
            ("context 1024 of the model's 4096 tokens", "more --kv-tokens would give a longer context"),
        ),
        (
            ContextSize(2048, "positions"),
            "bf16",
            (
                "context 2048 of the model's 4096 tokens",
                "--max-context would give a longer context, whose later positions have no proven accuracy",
            ),
        ),
        (
            ContextSize(2048, "memory"),
            "bf16",
            (
                "context 2048 of the model's 4096 tokens",
                "--kv-dtype q8, more free memory, or --max-context in spite of it, would give a longer context",
            ),
        ),
        (
            ContextSize(2048, "memory"),
            "q8",
            (
                "context 2048 of the model's 4096 tokens",
                "more free memory, or --max-context in spite of it, would give a longer context",
            ),
        ),
    ],
)
def test_a_context_says_what_would_give_more(size, kv_dtype, words):
    model = SimpleNamespace(config=SimpleNamespace(max_positions=4096), kv_dtype=kv_dtype)
    assert context_words(SimpleNamespace(context=size, model=model)) == words


def test_the_first_line_says_the_context(monkeypatch, capsys):
    monkeypatch.setattr(cache_size, "LEAST_CONTEXT", 1024)
    monkeypatch.setattr(cache_size, "available_bytes", lambda: 0)
    for options, said in (
        ([], "(context 1024 of the model's 4096 tokens; --kv-dtype q8, more free memory, or"),
        (["--max-context", "2048"], "(context 2048 of the model's 4096 tokens; temperature 0)"),
    ):
        monkeypatch.setattr(sys, "stdin", Output(b""))
        assert main(["chat", *options]) == 0
        assert capsys.readouterr().err.startswith(said)


# ------------------------------------------------------------ inspect


def test_inspect_json(llm, capsys):
    assert main(["inspect", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["config"]["model_type"] == llm.model.config.model_type
    assert len(made["program"]) == len(llm.model.recorded.ops)
    assert {t["name"] for t in made["tensors"]} == set(llm.model.checkpoint.tensors)


def test_inspect_a_config_without_weights(tmp_path, capsys):
    config = FAMILY_CASES["gemma3"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {t["name"]: tuple(t["shape"]) for t in made["tensors"]} == tiny.shapes(config)
    assert main(["inspect", str(tmp_path)]) == 0
    top, _, short = " ".join(capsys.readouterr().out.split()).rpartition("in short")
    assert top.startswith(f"{tmp_path} has no weights (*.safetensors): it cannot be run. Shown is what its config asks")
    assert "Tensors, which are not there (--tensors lists them)" in top
    assert "weights missing: its config asks for" in short and "kB once the weights are there" in short
    assert "texts none without weights; with them token ids only: it has no tokenizer" in short
    assert "kept in" not in short
    tiny.write(tmp_path, config, tiny.tensors(config, 1), "BF16")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert made["program"] == stored["program"] and made["memory"] == stored["memory"]
    assert (made["has_weights"], stored["has_weights"]) == (False, True)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "not there" not in (shown := capsys.readouterr().out) and "missing" not in shown


def test_inspect_tables(capsys):
    assert main(["inspect"]) == 0
    short = capsys.readouterr().out
    assert main(["inspect", "--all", "--tensors"]) == 0
    full = capsys.readouterr().out
    assert "0-2" in short and "gated_delta" in short and "KV cache" in short
    assert "x linear attention" in short and "num_kv_heads" in short and "rope (dim" in short
    assert full.count("gated_delta") == 3 * short.count("gated_delta")
    assert "model.embed_tokens.weight" in full and "model.embed_tokens.weight" not in short


def test_inspect_says_in_short_what_a_first_start_makes(capsys, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "1")
    assert main(["inspect"]) == 0
    short = " ".join(capsys.readouterr().out.rpartition("in short")[2].split())
    assert "4,471,384 parameters of 5,455,832 numbers, 10.9 MB as stored; multiplied as bf16" in short
    assert "MB at the first start, kept in" in short and "generate and chat" in short
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "0")
    assert main(["inspect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 4471384
    assert main(["inspect"]) == 0
    assert "MB at each start: LOCKSTEP_CACHE_GB=0 allows 0 MB" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16", "q8_0", "q4_0"])
def test_packed_bytes_are_those_of_the_packed_arrays(weights, llm):
    from lockstep.engine.model import load_model
    from lockstep.weights.store import WeightStore

    model, store = load_model(llm.model.checkpoint, None, weights), WeightStore()
    backend = model.backend()
    for op in model.program.ops:
        if isinstance(op, Linear):
            arrays = store.arrays(op.weight, backend[op.kind].layout)
            assert packed_bytes(op, op.weight) == sum(a.nbytes for a in arrays)


def test_memory_is_what_the_engine_takes(llm):
    needed, runner = memory(llm.model.recorded), llm.engine.runner
    taken = sum(a.nbytes for name, a in runner.caches.items() if name.endswith("_pages"))
    assert needed["kv_cache_per_token"] * 64 * runner.limits.num_pages == taken
    assert needed["state_per_request"] == sum(a.nbytes for n, a in runner.caches.items() if not n.endswith("_pages"))
    both = needed["state_per_request"] + needed["drafts_per_request"]
    assert both == request_bytes(llm.model.recorded, EngineOptions(speculate="lookup").num_drafts)


def test_memory_of_an_mtp_head(llm):
    shown, config, tensors = (
        memory(llm.model.recorded, mtp_program(llm.model)),
        llm.model.config,
        llm.model.checkpoint.tensors,
    )
    heads = config.mtp_layers[0].mixer
    assert shown["mtp_cache_per_token"] == 2 * heads.num_kv_heads * heads.head_dim * 2
    shapes = [tensors[name].shape for name in tensors if name.startswith("mtp.")]
    shapes.append((config.vocab_size, config.hidden_size))  # the head that drafts read, in 8 bits as the layers
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    norms = sum(shape[0] for shape in shapes if len(shape) == 1)
    assert shown["mtp_weights"] == matrices * 34 // 32 + 4 * norms  # q8_0, and float32
    off, on = (needs(llm.model, EngineOptions(speculate=speculate)) for speculate in ("off", "mtp"))
    assert on.pages[0] - off.pages[0] == 64 * shown["mtp_cache_per_token"]
    assert on.weights - off.weights == shown["mtp_weights"]
    assert memory(llm.model.recorded)["mtp_weights"] == 0


def test_costs(llm):
    costs = op_costs(llm.model.recorded, 1000)
    linear = sum(c.flops for c in costs if c.kind == "linear")
    sizes = {op.weight.name: op.weight.shape for op in llm.model.recorded.ops if isinstance(op, Linear)}
    assert linear == 2 * sum(n * k for n, k in sizes.values())
    assert [layers for layers, _ in collapsed(costs)] == [None, [0, 1, 2], [3], None]
    attention = next(op for op in llm.model.recorded.ops if isinstance(op, Attention))
    assert attention.flops(2000) == 2 * attention.flops(1000) == 4 * (4 * 64 + 4) * 2000


def test_spans():
    assert spans([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
