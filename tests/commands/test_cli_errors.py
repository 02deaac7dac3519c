"""Errors on the command line: a sentence for a user's mistake, a traceback for a fault of the program."""

import errno
import importlib.util
import io
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tomllib

import pytest

from lockstep import LLM
from lockstep.cli import main
from lockstep.native.host import UnfitMachine

ROOT = pathlib.Path(__file__).parents[2]


def run(*args):
    return main(["generate", *args])


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compiles the bundled model's kernels, where they are not: progress would stand beside the errors."""
    LLM(max_requests=1).close()


@pytest.mark.parametrize(("args", "said"), [
    (["-p", "x", "-f", "y"], "expected one prompt"),
    (["-p", ""], "the prompt is empty"),
    (["-p", "x", "-n", "0"], "greater than or equal to 1"),
    (["-p", "x", "-n", "many"], "-n"),
    (["-p", "x", "-n", "5000"], "is more than the context of 4096 tokens"),
    (["-p", "x " * 9000], "the prompt has 9001 tokens, which leave no room for an answer in the context of 4096: expe"),
    (["-p", "x " * 200, "--max-context", "100"], "100: expected a shorter prompt, or a larger --max-context"),
    (["-p", "x " * 9000, "-n", "2"], "tokens plus max_tokens 2 is more"),
    (["-p", "x", "--top-p", "2"], "top_p: expected a number from"),
    (["-p", "x", "--temperature", "nan"], "temperature: expected a number from"),
    (["-p", "x", "--weights", "q9"], "weights 'q9': expected one of auto"),
    (["-p", "x", "--weights", "Q4_K_M"], "q8_0, q4_0; other formats are not made from a model, they come with a"),
    (["-p", "x", "--kv-dtype", "f8"], "kv_dtype 'f8'"),
    (["-p", "x", "--op", "linear"], "--op linear: expected KIND=BACKEND"),
    (["-p", "x", "--op", "linear=gpu"], "no such backend"),
    (["-p", "x", "--op", "liner=cpu"], "--op liner=cpu: the model has no op of this kind; it has add, adjust_logits, "),
    (["-p", "x", "--op", "expert_linear_f32=cpu"], "in the groups linear, attention, elementwise"),
    (["-p", "x", "--op", "add=cpu", "--op", "add=reference"], "--op add=reference: add is given twice, cpu before"),
    (["-p", "x", "--stop", ""], "stop: expected non-empty strings"),
    (["-p", "x", "--logit-bias", "5"], "--logit-bias 5: expected ID:BIAS, such as 42:-100"),
    (["-p", "x", "--logit-bias", "4:1000"], "logit_bias of token 4: expected a number from -100 to 100, got 1000.0"),
    (["-p", "x", "--logit-bias", "9999:1"], "logit_bias: token ids must be 0 to 4095, got 9999"),
    (["-p", "x", "-n", "5", "--min-tokens", "6"], "min_tokens: expected at most max_tokens, 5, got 6"),
    (["nowhere", "-p", "x"], "nowhere: no such folder or file"),
    (["a", "b", "-p", "x"], "'b': expected a prompt"),
    (["-f", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    (["-p", "\udc80"], "surrogate"),
    (["-p", "x", "--regex", "a", "--grammar", "b:"], "expected at most one of --json-schema, --regex and --grammar"),
    (["-p", "x", "--json-schema", "nowhere.json"], "--json-schema: 'nowhere.json': expected a file, or a JSON schema,"),
    (["-p", "x", "--grammar", "nowhere"], "--grammar: 'nowhere': expected a file, or a grammar, which has a colon"),
    (["-p", "x", "--json-schema", '{"type": '], "--json-schema: expected a JSON schema, this is not JSON: Expecting"),
    (["-p", "x", "--json-schema", '{"type": "objec"}'], "--json-schema: Invalid type: objec"),
    (["-p", "x", "--json-schema", '{"uniqueItems": true}'], "--json-schema: Unimplemented keys"),
    (["-p", "x", "--regex", "(?=a)b"], "--regex: "),
    (["-p", "x", "--grammar", 'rule ::= "a"'], "--grammar: GBNF grammar: expected a rule root"),
    (["--bogus"], "--bogus"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(args, said, capsys):
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert not out and said in err
    assert err.startswith("lockstep: ") and err.count("\n") == 1


def test_the_format_of_weights_may_be_in_capitals(capsys):
    assert main(["inspect", "--weights", "Q8_0", "--json"]) == 0
    capitals = capsys.readouterr().out
    assert main(["inspect", "--weights", "q8_0", "--json"]) == 0
    assert capitals == capsys.readouterr().out


class Terminal(io.TextIOWrapper):
    """Standard input of nothing that is, or is not, a terminal."""

    def __init__(self, is_terminal):
        super().__init__(io.BytesIO(), "utf-8")
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize(("stdin", "said"), [
    (Terminal(True), "expected one prompt: -p TEXT, -f FILE or standard input, as a pipe or as - in its place"),
    (Terminal(False), "standard input is empty: expected a prompt there, or as -p TEXT or -f FILE"),
    (None, "expected one prompt"),
])  # fmt: skip
def test_no_prompt_is_one_sentence(stdin, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run() == 2
    assert capsys.readouterr().err.startswith(f"lockstep: {said}")
    assert run("-") == 2


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_prompt_that_was_read_as_a_model_is_named(is_terminal, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal(is_terminal))
    for name, said in (("hello", "no such folder or file, and not a hub name"), (str(tmp_path), "expected ")):
        assert run(name) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"lockstep: {name}: {said}") and err.endswith(
            "a prompt is given as -p TEXT or -f FILE)\n"
        )
    for model in ("bundled", "org/model"):
        assert run(model) == 2
        assert "expected" in (err := capsys.readouterr().err) and "MODEL" not in err


@pytest.mark.parametrize("options", [[], ["--help"], ["--rate", "4"]], ids=str)
def test_the_old_name_of_a_command_names_the_new_one(options, capsys):
    assert main(["bench", "serve", *options]) == 2
    assert capsys.readouterr().err == "lockstep: bench serve: this command is called lockstep bench load now\n"


def test_bad_files(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert run("-f", str(tmp_path / "latin.txt")) == 2
    assert "latin.txt: not UTF-8 text, byte 0 is 0xe9" in capsys.readouterr().err
    assert run(str(tmp_path), "-p", "x") == 2
    assert f"{tmp_path}: expected" in capsys.readouterr().err
    assert run("-f", str(tmp_path)) == 2
    assert "Is a directory" in capsys.readouterr().err


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (MemoryError("for 3 GiB"), "not enough memory: for 3 GiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "m.gguf"), "not enough memory: m.gguf"),
        (
            ImportError("a.so: failed to map segment from shared object"),
            "not enough memory: a.so: failed to map segment",
        ),
        (
            caused(OSError("cannot load b.so"), OSError("b.so: failed to map segment")),
            "not enough memory: b.so: failed",
        ),
        (RuntimeError("can't start new thread"), "no thread can be started: there is no memory for it, or"),
        (caused(RuntimeError("no loop"), RuntimeError("can't start new thread")), "no thread can be started"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/no/file"), "/no/file: No space left on device, "),
        (PermissionError(errno.EACCES, "Permission denied", "m.gguf"), "m.gguf: Permission denied\n"),
        (UnfitMachine("self-check failed: op add gives other bits"), "self-check failed: op add gives other bits\n"),
    ],
    ids=repr,
)
def test_what_a_machine_lacks_is_one_sentence(error, said, monkeypatch, capsys):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("lockstep.commands.generate.load", fail)
    assert main(["generate", "-p", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"lockstep: {said}")


@pytest.mark.parametrize("error", [RuntimeError("two ops differ"), ImportError("no module"), ZeroDivisionError()])
def test_a_fault_of_the_program_shows_where_it_is(error, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("lockstep.commands.generate.load", fail)
    with pytest.raises(type(error)):
        main(["generate", "-p", "x"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about a CPU of this kind")
def test_a_cpu_that_is_too_old_is_one_sentence():
    old = dict(NUMBA_CPU_NAME="nehalem", NUMBA_CPU_FEATURES="+sse4.2")
    command = [sys.executable, "-m", "lockstep", "generate", "-p", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | old)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "lockstep: Lockstep needs a CPU with AVX2 (any since 2015); 'nehalem' has none\n"


def test_where_standard_error_is_closed_only_the_exit_code_says_it():
    command = ["sh", "-c", f"{sys.executable} -m lockstep generate -p x --weights nothing 2>&-"]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.parametrize("args", ["generate -p x", "list", "chat -p hi", "--help"])
def test_a_closed_standard_output_is_one_sentence(args):
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m lockstep {args} >&-"], capture_output=True, text=True)
    said = "lockstep: standard output is closed: expected something to print to, such as > /dev/null\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_closed_standard_input_is_one_sentence():
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m lockstep chat <&-"], capture_output=True, text=True)
    assert done.returncode == 2 and "lockstep: standard input is closed: expected questions there" in done.stderr


def test_a_standard_input_that_does_not_end_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("lockstep.commands.terminal.texts.MOST_PIPED", 5 << 20)
    with open("/dev/zero") as endless:
        monkeypatch.setattr("sys.stdin", endless)
        assert run("-n", "5") == 2
    assert "standard input has more than 5 MiB: expected a text that ends" in capsys.readouterr().err


def test_a_prompt_longer_than_any_context_is_refused(capsys, tmp_path):
    (tmp_path / "long").write_text("x" * ((32 << 20) + 1))
    assert run("-f", str(tmp_path / "long")) == 2
    assert "the prompt has 33,554,433 characters, expected at most 33,554,432" in capsys.readouterr().err


def test_a_limit_of_the_cache_that_is_no_number_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "abc")
    assert run("-p", "x", "-n", "1") == 2
    assert "LOCKSTEP_CACHE_GB: expected a number of gigabytes from 0, got 'abc'" in capsys.readouterr().err


def test_a_hub_name_offline(capsys, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    assert run("org/model", "-p", "x") == 2
    assert "fetching org/model from the Hugging Face hub failed: network is unreachable" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "said"), [
    (["compose"], "No such command 'compose'"),
    (["generat", "-p", "x"], "Did you mean 'generate'?"),
    (["bench", "lod"], "bench lod: no such command or model; did you mean lockstep bench load?"),
    (["ptq", "evla", "--text", "x"], "ptq evla: no such command or model; did you mean lockstep ptq eval?"),
    (["generate", "--tempersture", "1"], "--temperature"),
])  # fmt: skip
def test_unknown_commands(args, said, capsys):
    assert main(args) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("args", "said"), [
    ("generate --n-predict 4 -p x", "--n-predict; it is called -n or --max-tokens here"),
    ("generate -p x --max-new-tokens=4", "--max-new-tokens; it is called -n or --max-tokens here"),
    ("generate -c 4 -p x", "-c; it is called --max-context here"),
    ("chat --ctx-size 2048", "--ctx-size; it is called --max-context here"),
    ("inspect --ctx-size 2048", "--ctx-size; did you mean --context?"),
    ("generate -ngl 99 -p x", "-ngl: Lockstep computes on CPUs, and has no option for GPUs"),
    ("serve -ngl 99", "-ngl: Lockstep computes on CPUs, and has no option for GPUs"),
    ("serve --n-gpu-layers 99", "--n-gpu-layers: Lockstep computes on CPUs, and has no option for GPUs"),
    ("generate --gpu -p x", "--gpu: Lockstep computes on CPUs, and has no option for GPUs"),
    ("serve -np 4", "-np; it is called --max-requests here"),
    ("generate -m x.gguf -p x", "-m; it is an argument without a name here: lockstep generate MODEL"),
    ("bench load --model x.gguf", "--model; it is an argument without a name here: lockstep bench load MODEL"),
    ("generate --stream -p x", "--stream"),
    ("generate --temp 1", "--temp; did you mean --temperature?"),
    ("serve --prot 1", "--prot; did you mean --port?"),
    ("generate -x", "-x"),
])  # fmt: skip
def test_an_option_that_there_is_not(args, said, capsys):
    assert main(args.split()) == 2
    assert capsys.readouterr().err == f"lockstep: No such option: {said} (lockstep --help lists commands and options)\n"


def test_plot_names_a_command_that_installs_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, find=importlib.util.find_spec: (
        None if name == "matplotlib" else find(name)
    ))  # fmt: skip
    assert main(["bench", "--plot", "x.png"]) == 2
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    command = f"{shlex.quote(sys.executable)} -m pip install '{extras['plot'][0]}'"
    assert capsys.readouterr().err == f"lockstep: --plot needs matplotlib: {command}\n"


@pytest.mark.parametrize(("args", "said"), [
    (["generate", "no.gguf", "-p", "x"], "no.gguf: no such folder or file\n"),
    (["inspect", "./no/model"], "./no/model: no such folder or file\n"),
    (["generate", "-p", "x", "--threads", "257"], "--threads"),
    (["parity", "--length", "1"], "--length"),
    (["parity", "-p", "", "--length", "5"], "the prompt is empty\n"),
    (["bench", "--plot", "/no/such/x.png"], "--plot /no/such/x.png: expected a file name ending in .png"),
    (["bench", "--plot", "x.doc"], "--plot x.doc: expected a file name ending in .png"),
])  # fmt: skip
def test_a_mistake_is_found_before_anything_is_done(args, said, capsys):
    if args[0] == "bench":
        pytest.importorskip("matplotlib")
    assert main(args) == 2
    assert said in capsys.readouterr().err


def test_files_that_are_no_models_or_cannot_encode_text(tmp_path, capsys):
    (tmp_path / "short.gguf").write_bytes(b"hi")
    assert run(str(tmp_path / "short.gguf"), "-p", "x") == 2
    assert "short.gguf: expected a GGUF file, it starts with b'hi'" in capsys.readouterr().err
