"""The command line as a user meets it: answers, errors in one sentence, exit codes, interruptions."""

import errno
import io
import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from lockstep import LLM, SamplingParams, __version__
from lockstep.cli import main
from lockstep.commands import answer, generate
from lockstep.commands.answer import Timing
from lockstep.commands.options import parse_swaps
from lockstep.commands.progress import Progress
from lockstep.runtime.unfit import UnfitMachine

PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def expected():
    """What the bundled model answers to PROMPT, greedily, in twelve tokens."""
    llm = LLM(max_requests=1)
    yield llm.generate([PROMPT], SamplingParams(max_tokens=12))[0]
    llm.close()


class Output(io.TextIOWrapper):
    """Standard input of given bytes."""

    def __init__(self, raw):
        super().__init__(io.BytesIO(raw), "utf-8")


def run(*args):
    return main(["generate", *args])


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lockstep {__version__}\n"
    assert main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out


def test_help_loads_no_kernels():
    code = (
        "import sys; from lockstep.cli import main; main(['--help']); "
        "sys.exit(bool({'numpy', 'numba', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_generate_streams_what_the_engine_says(expected, capsys):
    assert run("-p", PROMPT, "-n", "12") == 0
    out, err = capsys.readouterr()
    assert out == expected.text + "\n"
    assert "prompt 7 tokens" in err and "tok/s" in err and "first token after" in err


def test_an_8_bit_cache_answers_alike_however_the_prompt_is_cut(capsys):
    """Its kernels pass the self-check; a run that finds the prompt's pages answers as one that computes them."""
    llm = LLM(kv_dtype="q8", max_requests=2, max_step_tokens=50, threads=2)
    first, second = (llm.generate([PROMPT * 20], SamplingParams(max_tokens=12))[0] for _ in range(2))
    llm.close()
    assert run("-p", PROMPT * 20, "-n", "12", "--kv-dtype", "q8") == 0
    assert first.text == second.text == capsys.readouterr().out.removesuffix("\n")
    assert first.logprobs == second.logprobs


def test_a_second_run_finds_the_prompt_in_the_cache_dir_and_answers_the_same(capsys, tmp_path):
    answers = []
    for _ in range(2):
        assert run("-p", PROMPT * 12, "-n", "5", "--cache-dir", str(tmp_path / "kept")) == 0
        answers.append(capsys.readouterr().out)
        files = {f: f.stat().st_mtime_ns for f in (tmp_path / "kept").iterdir()}
    assert answers[0] == answers[1] and any(f.suffix == ".page" for f in files)
    assert run("-p", PROMPT, "--cache-dir", str(next(iter(files)))) == 2
    assert "cache_dir" in capsys.readouterr().err


def test_json(expected, capsys):
    assert run("-p", PROMPT, "-n", "12", "--json", "--logprobs", "2") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["text"] == expected.text and made["token_ids"] == expected.token_ids
    assert made["logprobs"] == expected.logprobs and made["finish_reason"] == "length"
    assert made["num_prompt_tokens"] == 7 and made["num_output_tokens"] == 12
    assert [len(each) for each in made["top_logprobs"]] == [2] * 12


def test_prompt_from_a_file_and_from_standard_input(expected, tmp_path, capsys, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_bytes(PROMPT.encode())
    answers = []
    for args in (["-f", str(path)], ["-"], ["-f", "-"]):
        monkeypatch.setattr(sys, "stdin", Output(PROMPT.encode()))
        assert run(*args, "-n", "12") == 0
        answers.append(capsys.readouterr().out)
    assert set(answers) == {expected.text + "\n"}


def test_echo_stop_and_other_ways_to_run(expected, capsys):
    assert run("-p", PROMPT, "-n", "12", "--echo", "--threads", "1", "--op", "silu_mul=reference") == 0
    assert capsys.readouterr().out == PROMPT + expected.text + "\n"
    stop = expected.text[4:6]
    assert run("-p", PROMPT, "-n", "12", "--stop", stop) == 0
    assert capsys.readouterr().out == expected.text[: expected.text.index(stop)] + "\n"


def test_a_seed_is_a_sample(capsys):
    outs = []
    for seed in ("1", "1", "2"):
        assert run("-p", PROMPT, "-n", "12", "--temperature", "1.5", "--seed", seed) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_penalties_biases_and_min_tokens_are_those_of_the_library(expected, capsys):
    flags = (
        "--repetition-penalty",
        "1.3",
        "--presence-penalty",
        "0.5",
        "--frequency-penalty",
        "0.2",
        "--logit-bias",
        "300:4.5",
        "--logit-bias",
        "17:-100",
        "--min-tokens",
        "9",
    )
    assert run("-p", PROMPT, "-n", "12", "--json", *flags) == 0
    made = json.loads(capsys.readouterr().out)
    llm = LLM()
    params = SamplingParams(
        max_tokens=12,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        logit_bias={300: 4.5, 17: -100},
        min_tokens=9,
    )
    same = llm.generate([PROMPT], params)[0]
    llm.close()
    assert (made["token_ids"], made["logprobs"]) == (same.token_ids, same.logprobs)
    assert made["token_ids"] != expected.token_ids


@pytest.mark.parametrize(("args", "said"), [
    ([], "expected one prompt: -p TEXT, -f FILE or -"),
    (["-p", "x", "-f", "y"], "expected one prompt"),
    (["-p", ""], "the prompt is empty"),
    (["-p", "x", "-n", "0"], "greater than or equal to 1"),
    (["-p", "x", "-n", "many"], "-n"),
    (["-p", "x", "-n", "5000"], "is more than the context of 4096 tokens"),
    (["-p", "x " * 9000], "tokens plus max_tokens"),
    (["-p", "x", "--top-p", "2"], "top_p: expected a number from"),
    (["-p", "x", "--temperature", "nan"], "temperature: expected a number from"),
    (["-p", "x", "--weights", "q9"], "weights 'q9': expected one of auto"),
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
    (["--bogus"], "--bogus"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(args, said, capsys):
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert not out and said in err
    assert err.startswith("lockstep: ") and err.count("\n") == 1


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


def test_a_hub_name_offline(capsys, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert run("org/model", "-p", "x") == 2
    assert "fetching org/model from the Hugging Face hub failed: network is unreachable" in capsys.readouterr().err


def test_unknown_commands(capsys):
    assert main(["compose"]) == 2
    assert "compose" in capsys.readouterr().err


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(answer, "answer", interrupted)
    assert run("-p", "x") == 130
    said = capsys.readouterr().err  # where kernels are not there yet, that they are compiled
    assert "Traceback" not in said and "KeyboardInterrupt" not in said


GENERATE = [
    sys.executable,
    "-m",
    "lockstep",
    "generate",
    "-p",
    PROMPT,
    "-n",
    "4000",
    "--temperature",
    "1.5",
    "--min-tokens",
    "4000",
]


def process_that_cannot_end(handler):
    """A process that writes more than a pipe takes, so that it waits for its reader, however fast it is. handler: what
    it inherits for SIGINT."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        process = subprocess.Popen(GENERATE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, pipesize=4096)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout.read(1)
    return process


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
def test_ctrl_c_leaves_no_traceback(handler):
    with process_that_cannot_end(handler) as process:
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and b"Traceback" not in error and b"Exception" not in error


def test_a_closed_pipe_leaves_no_traceback():
    with process_that_cannot_end(signal.SIG_DFL) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(600) == 141 and b"Traceback" not in error and b"Exception" not in error


def test_context_grows_with_the_prompt(monkeypatch):
    class Words:
        def encode(self, text):
            return text.split()

    monkeypatch.setattr(generate, "tokenizer_of", lambda model: Words())
    assert generate.needed_context(None, "word", 128) == 4096
    assert generate.needed_context(None, "word " * 1000, 128) == 4096
    assert generate.needed_context(None, "word " * 5000, 128) == 5184


def test_swaps():
    assert parse_swaps(["linear=reference", "add=cpu"]) == {"linear": "reference", "add": "cpu"}
    assert parse_swaps(None) == {}


def test_timing():
    timing = Timing(num_prompt=100, num_output=21, first_token=0.5, total=2.5)
    assert (timing.prefill_rate, timing.decode_rate) == (200, 10)
    assert Timing(3, 1, 0.1, 0.1).decode_rate == 0
    assert str(timing) == "prompt 100 tokens at 200.0 tok/s, decode 21 tokens at 10.0 tok/s, first token after 500 ms"
    assert str(Timing(1, 1, 0.1, 0.1)) == "prompt 1 token at 10.0 tok/s, decode 1 token, first token after 100 ms"
    drafted = str(Timing(1, 9, 0.1, 0.9, num_drafted=8, num_accepted=5))
    assert drafted.endswith("decode 9 tokens at 10.0 tok/s (5 of 8 drafts right), first token after 100 ms")
    assert str(Timing(1)) == "prompt 1 token at 0.0 tok/s, decode 0 tokens, first token after 0 ms"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_progress(stream, monkeypatch):
    monkeypatch.setattr("lockstep.commands.progress.QUIET_SECONDS", 0)
    with Progress(stream) as progress:
        progress.packing("packing", 5_000_000, None)
        progress.compiling("one")
        progress.compiling("two")
    said = stream.getvalue()
    assert "compiling kernels for this CPU, first time only" in said and "ready after" in said
    assert ("2 (two)" in said) == stream.isatty() != ("packing weights, first time only\n" in said)


def test_progress_of_a_moment_is_silent():
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.packing("packing", 1, None)
    assert stream.getvalue() == ""


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


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_more_threads_than_cores_are_remarked_on(capsys):
    assert run("-p", PROMPT, "-n", "2", "--threads", "64") == 0
    assert "lockstep: 64 threads on" in capsys.readouterr().err


def test_files_that_are_no_models_or_cannot_encode_text(tmp_path, capsys):
    (tmp_path / "short.gguf").write_bytes(b"hi")
    assert run(str(tmp_path / "short.gguf"), "-p", "x") == 2
    assert "short.gguf: expected a GGUF file, it starts with b'hi'" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["inspect"], ["inspect", "--json"]])
def test_output_that_nobody_reads(args):
    command = [sys.executable, "-m", "lockstep", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141
