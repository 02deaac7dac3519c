"""The commands of quantization studies: `lockstep ptq`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lockstep.cli import main
from lockstep.ptq.plan import Plan

TEXTS = Path(__file__).parents[2] / "studies" / "texts"
EVALUATION, CALIBRATION = str(TEXTS / "evaluation.txt"), str(TEXTS / "calibration.txt")
SHORT = ("--text", EVALUATION, "--windows", "2", "--length", "48")
PLAN = Plan([["*", "i16"], ["*.w", "u4/row:mse"], ["L*.k.all", "i8/head"]])


def evaluated(capsys, *args):
    assert main(["ptq eval", *SHORT, "--json", *args]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.to_toml())
    return str(path)


def test_sites_are_listed(capsys):
    assert main(["ptq", "sites", "--match", "L3.q*"]) == 0
    said = capsys.readouterr().out
    assert "L3.qk.raw" in said and "inside an op" in said and "L3.k" not in said
    assert main(["ptq", "sites", "--match", "*.w", "--json"]) == 0
    assert all(site["is_weight"] for site in json.loads(capsys.readouterr().out))
    assert main(["ptq", "sites", "--match", "x*"]) == 2
    assert "--match 'x*': it matches none of the model's" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["ptq"], ["ptq", "--help"]])
def test_the_first_word_alone_lists_the_commands(args, capsys):
    assert main(args) == 0
    assert "Usage: lockstep ptq [" in (said := capsys.readouterr().out) and "\n  confirm  " in said


def test_a_text_is_scored(capsys):
    found = evaluated(capsys)
    assert found["float"]["tokens"] == 96 and found["windows"] == 2 and 1 < found["float"]["nll"] < 5
    assert found["plan_hash"] is None and "plan" not in found
    half = evaluated(capsys, "--like", "llama.cpp")
    assert half["float"]["tokens"] == 46 and half["float"]["nll"] != found["float"]["nll"]
    assert main(["ptq", "eval", *SHORT]) == 0
    assert "96 tokens scored, 2 windows of 48, twin prefill_reference" in capsys.readouterr().out


def test_a_plan_is_scored_and_both_twins_say_the_same(plan, capsys):
    args = ("--plan", plan, "--calibrate", CALIBRATION, "--calibration-windows", "2")
    found = evaluated(capsys, *args)
    assert found["plan_hash"] == PLAN.hash
    assert found["against float"]["kl_mean"] > 0 and found["plan"]["nll"] != found["float"]["nll"]
    slow = evaluated(capsys, *args, "--twin", "prefill")
    assert slow | dict(twin="") == found | dict(twin="")
    assert main(["ptq", "eval", *SHORT, *args]) == 0
    assert "same top token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--like", "vllm"], "--like 'vllm': expected llama.cpp"),
        (["--twin", "fast"], "--twin 'fast': expected prefill or prefill_reference"),
        (["--calibrate", CALIBRATION], "--calibrate and --calibration-windows: expected only with --plan"),
        (["--plan", "PLAN"], "plan.toml: its grids need ranges; expected --calibrate FILE"),
        (["--plan", "PLAN", "--calibrate", EVALUATION], "its tokens 0 to 31 are tokens 0 to 31 of the evaluation text"),
        (["--plan", "no.toml"], "no.toml: No such file or directory"),
        (["--plan", "PLAN", "--kv-dtype", "bf16"], "--kv-dtype bf16: with --plan weights and cache are float32"),
        (
            ["--plan", "PLAN", "--weights", "q8_0"],
            "--weights q8_0: with --plan weights and cache are float32; ",
        ),
        (["--plan", "RECIPE"], "recipe.toml: it is a recipe; expected its [plan] alone, as a file with rules = [..]"),
        (["--plan", "FILE.json"], "cannot be read as JSON"),
    ],
)
def test_a_mistake_is_one_sentence(args, said, plan, tmp_path, capsys):
    files = {"PLAN": plan, "RECIPE": str(tmp_path / "recipe.toml"), "FILE.json": str(tmp_path / "broken.json")}
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "broken.json").write_text("{")
    assert main(["ptq", "eval", *SHORT, *(files.get(arg, arg) for arg in args)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--weights", "--kv-dtype"])
def test_formats_that_no_plan_can_have_are_refused_before_a_model_is_loaded(option, plan, monkeypatch, capsys):
    monkeypatch.setattr("lockstep.study.scoring.subject.load_subject", None)
    assert main(["ptq", "eval", *SHORT, "--plan", plan, option, "bf16"]) == 2
    assert f"{option} bf16: with --plan" in capsys.readouterr().err


def test_a_plan_that_is_not_solved_says_what_is(tmp_path, capsys):
    (tmp_path / "winner.toml").write_text(RECIPE)
    assert main(["generate", "-p", "x", "--plan", str(tmp_path / "winner.toml")]) == 2
    said = capsys.readouterr().err
    assert "winner.toml: a plan or a recipe in TOML has no grids yet; expected a solved plan" in said
    assert "as `lockstep ptq run RECIPE` writes it (winner.json)" in said and "there is" not in said
    (tmp_path / "winner.json").write_text("{")
    assert main(["generate", "-p", "x", "--plan", str(tmp_path / "winner.toml")]) == 2
    assert f"(winner.json); there is {tmp_path / 'winner.json'}" in capsys.readouterr().err
    assert main(["generate", "-p", "x", "--plan", str(tmp_path / "winner.json")]) == 2
    assert "cannot be read as JSON" in (said := capsys.readouterr().err) and "expected a solved plan" in said


# ------------------------------------------------------------ studies

RECIPE = f"""
[calibrate]
text = "{CALIBRATION}"
windows = 2
length = 48
[evaluate]
text = "{EVALUATION}"
windows = 2
length = 48
[plan]
rules = [["*", "i16"]]
[[sweep]]
k = {{ sites = "L3.k.all", spec = ["u4", "u4/head"] }}
[[sweep]]
one_at_a_time = {{ sites = "L3.[pv]", spec = "u4" }}
[confirm]
top = 1
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(RECIPE)
    return tmp_path / "small.toml"


def test_a_study_from_recipe_to_confirmation(recipe, tmp_path, capsys):
    assert main(["ptq", "run", "small.toml"]) == 0
    folder = tmp_path / "small-study"
    said = capsys.readouterr().out
    assert "k u4/head" in said and str(folder.relative_to(tmp_path) / "report.html") in said
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [trial["name"] for trial in trials] == ["base", "k u4", "k u4/head", "L3.v u4", "L3.p u4"]
    assert json.loads((folder / "study.json").read_text())["calibration"]["forwards"] == 2
    before = (folder / "trials.jsonl").read_bytes()
    assert main(["ptq", "run", "small.toml", "--jobs", "2"]) == 0
    assert (folder / "trials.jsonl").read_bytes() == before
    assert main(["ptq", "confirm", str(folder)]) == 0
    assert "the same bits in all 96 tokens" in capsys.readouterr().out
    assert main(["ptq", "show", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    found = evaluated(capsys, "--plan", str(folder / "winner.json"))
    best = min(trials, key=lambda trial: trial["metrics"]["delta_nll"])
    assert found["plan"]["nll"] == best["metrics"]["nll"] and found["plan_hash"] == best["plan_hash"]
    assert main(["ptq", "run", str(folder / "winner.toml"), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "trials.jsonl").read_text())
    assert again["metrics"]["nll"] == best["metrics"]["nll"]


def test_a_recipe_that_changed_is_refused(recipe, tmp_path, capsys):
    assert main(["ptq", "run", "small.toml", "--out", "study", "--set", "sweep=[]"]) == 0
    assert (
        main(["ptq", "run", "small.toml", "--out", "study", "--set", "sweep=[]", "--set", "calibrate.windows=3"]) == 2
    )
    assert "another recipe: calibrate.windows was 2 and is now 3; expected a new folder" in capsys.readouterr().err
    assert main(["ptq", "confirm", str(tmp_path)]) == 2
    assert "there is no recipe.toml; expected the folder of a study" in capsys.readouterr().err


def test_a_study_of_which_nothing_could_run_says_why(recipe, capsys, monkeypatch):
    def solve(*args):
        raise ValueError("site L3.k.all: calibration saw no number")

    monkeypatch.setattr("lockstep.study.trial_bench.Solved.solve", solve)
    assert main(["ptq", "run", "small.toml", "--set", "sweep=[]"]) == 2
    out, err = capsys.readouterr()
    assert "\nbase failed: site L3.k.all: calibration saw no number\n" in out
    assert err.endswith("lockstep: small-study: none of the 1 trials could run, for the reasons above\n")


def test_nothing_is_confirmed_where_the_recipe_says_so(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("top = 1", "top = 0"))
    assert main(["ptq", "confirm", str(tmp_path)]) == 2
    assert "its recipe says confirm.top = 0, so nothing is to be confirmed; expected --top N" in capsys.readouterr().err


def test_a_file_in_the_place_of_a_folder(recipe, capsys):
    for args in (["run", "small.toml", "--out", "small.toml"], ["confirm", "small.toml"], ["show", "small.toml"]):
        assert main(["ptq", *args]) == 2
        assert capsys.readouterr().err == "lockstep: small.toml: it is a file, expected the folder of a study\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (f'calibrate.text="{EVALUATION}"', "its tokens 0 to 31 are tokens 0 to 31 of the evaluation text"),
        ("evaluate.sha256=" + "0" * 64, "evaluation.txt: its SHA-256 is 3cf9246d"),
        ("evaluate.windows=9999", "9999 windows of 48 tokens wanted, it has"),
        ('plan.rules=[["L9.p", "u8"]]', "rule 'L9.p' = 'u8' matches no site"),
        ('plan.arithmetic="int"', "arithmetic is 'int', expected one of float, integer"),
        ('plan.rules=[["L3.p", "q4_0"]]', "q4_0 is a format of weights; expected i2 .. i16, u2 .. u16, fp8,"),
        ("model=5", "small.toml: model is 5, expected a text: a folder, a .gguf file, a hub name or 'bundled'"),
        ('model="no/such/model.gguf"', "model.gguf"),
    ],
)
def test_a_recipe_that_cannot_be_run(change, said, recipe, capsys):
    assert main(["ptq", "run", "small.toml", "--set", change]) == 2
    assert said in capsys.readouterr().err
    assert not (recipe.parent / "small-study").exists()


def test_ctrl_c_while_processes_start_leaves_no_traceback(recipe):
    arguments = ["ptq", "run", "small.toml", "--jobs", "2", "--set", "calibrate.windows=1"]
    command = [sys.executable, "-m", "lockstep", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        children, starting = Path(f"/proc/{process.pid}/task/{process.pid}/children"), []
        while process.poll() is None and not starting:
            starting = [child for child in children.read_text().split() if is_starting(child)]
            time.sleep(0.001)
        is_deaf = [hears_no_interrupt(child) for child in starting]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
        error = process.communicate(timeout=600)[1]
    assert is_deaf and all(is_deaf)
    assert process.returncode == 130 and b"Traceback" not in error and b"Interrupt" not in error


def is_starting(process):
    """Whether a process is a study's worker in the middle of its imports; False for one that has ended."""
    try:
        about = [Path(f"/proc/{process}/{name}").read_text() for name in ("cmdline", "maps")]
        return "spawn_main" in about[0] and "numpy" in about[1]
    except OSError:
        return False


def hears_no_interrupt(process):
    """Whether SIGINT is blocked in a process, or ignored."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return any(int(status[name], 16) >> signal.SIGINT - 1 & 1 for name in ("SigBlk", "SigIgn"))
