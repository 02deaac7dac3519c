"""lm-eval runs tasks against the server: its scores are the engine's log-probabilities, bit for bit, for every number
of questions per request and of concurrent requests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep import LLM, SamplingParams
from tests.serve.program import program

pytest.importorskip("lm_eval")
TASKS = Path(__file__).with_name("lm_eval_tasks")
QUESTIONS = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]
CASES = [(1, 1), (8, 1), (1, 32), (32, 4)]  # (questions per request, concurrent requests)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks, with the full path of their data filled in."""
    folder = Path(shutil.copytree(TASKS, tmp_path_factory.mktemp("lm_eval") / "tasks"))
    for file in folder.glob("*.yaml"):
        file.write_text(file.read_text().replace("DATA", str(folder / "questions.jsonl")))
    return folder


@pytest.fixture(scope="module")
def found(tasks, tmp_path_factory):
    """{case: (scores of all tasks, {task: logged samples})}"""
    with program("--max-requests", 32, "--max-context", 1024) as server:
        return {case: evaluate(server.url, tasks, *case, tmp_path_factory.mktemp("out")) for case in CASES}


def evaluate(url, tasks, batch_size, num_concurrent, out):
    """Runs the command lm_eval."""
    model = (
        f"model=lockstep,base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent={num_concurrent},"
        "max_length=1024"
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "local-completions",
        "--model_args",
        model,
        "--tasks",
        "lockstep_choice,lockstep_answer",
        "--include_path",
        tasks,
        "--batch_size",
        batch_size,
        "--output_path",
        out,
        "--log_samples",
    ]
    environment = os.environ | dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=str(tasks / "cache"))
    done = subprocess.run(list(map(str, command)), env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    [results], samples = out.rglob("results_*.json"), {}
    for file in out.rglob("samples_*.jsonl"):
        name = "choice" if "choice" in file.name else "answer"
        samples[name] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda s: s["doc_id"])
    return json.loads(results.read_text())["results"], samples


def test_scores_are_the_engines_own_bits(found):
    llm = LLM(threads=1, max_requests=8, max_context=1024)
    _, samples = found[CASES[0]]
    for question, sample in zip(QUESTIONS, samples["choice"], strict=True):
        expected = [score(llm, question["text"], choice) for choice in question["choices"]]
        assert [(float(s), g in (True, "True")) for s, g in sample["filtered_resps"]] == expected
    llm.close()


def score(llm, text, choice):
    """(sum of the choice's log-probabilities, whether each of its tokens is the likeliest), as lm-eval adds them up:
    spaces at the end of the text belong to the choice."""
    context, whole = llm.encode(text.rstrip()), llm.encode(text + choice)
    answer = llm.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=1))[0]
    start = len(context) - 1  # the first token has no log-probability
    own, best = answer.prompt_logprobs[start:], [max(top.values()) for top in answer.prompt_top_logprobs[start:]]
    return sum(own), own == best


def test_the_model_knows_more_than_chance_and_not_all(found):
    results, samples = found[CASES[0]]
    accuracy = results["lockstep_choice"]["acc,none"]
    assert 0.5 < accuracy <= 1
    greedy = [g in (True, "True") for sample in samples["choice"] for _, g in sample["filtered_resps"]]
    assert any(greedy) and not all(greedy)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_scores_do_not_depend_on_the_batch(found, case):
    for task, samples in found[CASES[0]][1].items():
        alone, together = ([s["filtered_resps"] for s in each] for each in (samples, found[case][1][task]))
        assert alone == together and len(alone) == len(QUESTIONS)
    assert {t: r.get("acc,none") for t, r in found[case][0].items()} == {
        t: r.get("acc,none") for t, r in found[CASES[0]][0].items()
    }
