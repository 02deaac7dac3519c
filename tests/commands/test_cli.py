"""`lockstep generate` on the command line: answers and their figures."""

import io
import json
import re
import subprocess
import sys

import jsonschema
import pytest

from lockstep import LLM, SamplingParams, __version__
from lockstep.cli import COMMANDS, main
from lockstep.commands import generate
from lockstep.commands.options import parse_swaps
from lockstep.commands.terminal.answer import Timing
from lockstep.text.grammars import structured

PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def expected():
    """The bundled model's greedy answer to PROMPT, of twelve tokens."""
    llm = LLM(max_requests=1, threads=1)
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
    assert "generate" in (said := capsys.readouterr().out)
    for args in (["-h"], ["help"]):
        assert main(args) == 0
        assert capsys.readouterr().out == said
    assert main(["help", "cache", "prune"]) == 0
    assert "Usage: lockstep cache prune" in capsys.readouterr().out
    assert main(["ptq", "-h"]) == 0
    assert "Usage: lockstep ptq [" in (said := capsys.readouterr().out) and "\n  sites " in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([*command.split(), "-h"]) == 0
    assert f"Usage: lockstep {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("group", "said"), [("ptq", "how few bits"), ("receipt", "sign receipts of answers")])
@pytest.mark.parametrize("options", [[], ["-h"], ["--help"]], ids=str)
def test_a_group_explains_itself(group, said, options, capsys):
    assert main([group, *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"Usage: lockstep {group} ") and said in shown
    assert "An LLM inference engine" not in shown and "--version" not in shown


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
        assert run("-p", PROMPT * 20, "-n", "5", "--cache-dir", str(tmp_path / "kept")) == 0
        answers.append(capsys.readouterr().out)
        files = {f: f.stat().st_mtime_ns for f in (tmp_path / "kept").iterdir()}
    assert answers[0] == answers[1] and any(f.suffix == ".page" for f in files)
    assert run("-p", PROMPT * 20, "-n", "5", "--cache-dir", str(tmp_path / "kept"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_cached_tokens"] == 128
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
    for args in (["-f", str(path)], ["-"], ["-f", "-"], []):
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


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}


def test_an_answer_has_the_form_that_is_asked_for(tmp_path, capsys):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert run("-p", "# JSON\n", "--json-schema", str(path), "--speculate", "lookup") == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)
    assert run("-p", "x", "-n", "2", "--regex", "[0-9]{9}") == 0
    out, err = capsys.readouterr()
    assert re.fullmatch("[0-9]+\n", out) and "was cut at 2 tokens, perhaps before --regex is fulfilled; -n N" in err


def test_a_form_is_a_file_or_the_text_itself(tmp_path):
    form = generate.answer_form
    for text, read in ((json.dumps(SCHEMA), lambda form_text: form(form_text, None, None)),
                       ('root ::= "yes" | "no"', lambda form_text: form(None, None, form_text)),
                       ('start: "yes" | "no"', lambda form_text: form(None, None, form_text))):  # fmt: skip
        (tmp_path / "file").write_text(text)
        assert read(text) == read(str(tmp_path / "file"))
    assert form(None, None, None) is None and form(None, "a+", None) == ("--regex", structured.regex("a+"))
    assert form(None, None, 'root ::= "a"') == ("--grammar", structured.lark_or_gbnf('root ::= "a"'))


def test_options_that_have_no_effect_say_so(expected, capsys):
    unused = ("--seed", "3", "--top-p", "0.5", "--logprobs", "2", "--draft", "3", "--max-context", "99999")
    assert run("-p", PROMPT, "-n", "12", *unused) == 0
    out, err = capsys.readouterr()
    assert out == expected.text + "\n"
    assert err.splitlines()[:-1] == [
        "lockstep: --seed has no effect at temperature 0, which always takes the most probable token",
        "lockstep: --top-p has no effect at temperature 0, which always takes the most probable token",
        "lockstep: --logprobs has no effect without --json",
        "lockstep: --draft has no effect without --speculate",
        "lockstep: --max-context 99999 has the effect of 4096: the model has no more positions",
    ]
    used = ("--seed", "3", "--temperature", "1", "--logprobs", "2", "--json", "--max-context", "512")
    assert run("-p", PROMPT, "-n", "2", *used) == 0
    assert "effect" not in capsys.readouterr().err


@pytest.mark.parametrize(("args", "said"), [
    (["inspect", "--json", "--all", "--tensors"], ["--tensors has no effect with --json, which has all of it",
                                                   "--all has no effect with --json, which has all of it"]),
    (["bench", "load", "--rate", "0", "--burst", "2", "--check-sample", "3", "--requests", "1", "--output", "1"],
     ["--burst has no effect with --rate 0, where all requests arrive together",
      "--check-sample has no effect without --check"]),
    (["bench", "speculate", "--parts", "grouped", "--contexts", "8", "--acceptance", "50", "--kv-dtype", "x"],
     ["--contexts has no effect without --parts steps", "--acceptance has no effect without --parts answers"]),
    (["bench", "--quick", "--repeat", "2", "--kv-dtype", "x"],
     ["--repeat has no effect with --quick, which compares prompts once"]),
])  # fmt: skip
def test_other_commands_name_what_has_no_effect_too(args, said, capsys):
    main(args)
    remarks = [line.removeprefix("lockstep: ") for line in capsys.readouterr().err.splitlines() if "effect" in line]
    assert remarks == said


def test_inspect_names_a_context_beyond_the_model(capsys):
    assert main(["inspect", "--context", "5000"]) == 0
    assert "--context 5000: this model's context is 4096 tokens" in capsys.readouterr().err


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
    cached = Timing(num_prompt=100, num_output=21, first_token=0.5, total=2.5, num_cached=64)
    assert cached.prefill_rate == 72 and str(cached).startswith("prompt 100 tokens (64 cached, 36 computed) at 72.0")
    assert str(timing) == "prompt 100 tokens at 200.0 tok/s, decode 21 tokens at 10.0 tok/s, first token after 500 ms"
    assert str(Timing(1, 1, 0.1, 0.1)) == "prompt 1 token at 10.0 tok/s, decode 1 token, first token after 100 ms"
    drafted = str(Timing(1, 9, 0.1, 0.9, num_drafted=8, num_accepted=5))
    assert drafted.endswith("decode 9 tokens at 10.0 tok/s (5 of 8 drafts right), first token after 100 ms")
    assert str(Timing(1)) == "prompt 1 token at 0.0 tok/s, decode 0 tokens, first token after 0 ms"


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_more_threads_than_cores_are_remarked_on(capsys):
    assert run("-p", PROMPT, "-n", "2", "--threads", "64") == 0
    assert "lockstep: 64 threads on" in capsys.readouterr().err
