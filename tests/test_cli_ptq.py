"""The commands of quantization studies as a user meets them."""

import json
from pathlib import Path

import pytest

from lockstep.cli import main
from lockstep.ptq.plan import Plan

TEXTS = Path(__file__).parents[1] / "studies" / "texts"
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
        (["--plan", "PLAN", "--calibrate", CALIBRATION, "--kv-dtype", "bf16"], "need a cache of float32"),
        (["--plan", "PLAN", "--calibrate", CALIBRATION, "--weights", "bf16"], "rounded weights are float32"),
    ],
)
def test_a_mistake_is_one_sentence(args, said, plan, capsys):
    args = [plan if arg == "PLAN" else arg for arg in args]
    assert main(["ptq", "eval", *SHORT, *args]) == 2
    assert said in capsys.readouterr().err
