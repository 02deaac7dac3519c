"""`bench speculate`: recorded drafts have the chosen acceptance, ratios are those of the runs, answers are compared."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.cli import main
from lockstep.commands.bench_speculate import answers_table, steps_table
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.speculation.drafts import MAX_DRAFTS
from lockstep.lab.speculation import Bench, Plan, Replay, ReplayedHead, Setting, best_draft, compare
from tests.promise.models import Case, load

METHODS = ("wants_hidden", "observe", "ready", "is_behind", "seconds", "forget")  # of a Head, besides guess
ARGUMENTS = ["bench", "speculate", "--threads", "1", "--rounds", "1"]
SMALL = ["--requests", "1,2", "--prompt", "9", "--tokens", "12", "--acceptance", "50"]


def drafts_of(replay, request_id, length):
    """The drafts of a source in front of each token of an answer."""
    return [replay(SimpleNamespace(id=request_id, output_ids=[0] * i), 1, []).tokens[0] for i in range(length)]


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_as_many_drafts_are_right_as_asked_for(acceptance):
    answer = np.random.default_rng(0).integers(0, 50, 4000).tolist()
    drafts = drafts_of(Replay({3: answer}, acceptance, 50, 1), 3, 4000)
    assert abs(np.mean(np.array(drafts) == answer) - acceptance) < 0.025
    assert set(drafts) <= set(range(50))


def test_each_request_and_round_has_wrong_drafts_of_its_own():
    answer = [7] * 100
    first, second = Replay({0: answer, 1: answer}, 0.5, 9, 1), Replay({0: answer}, 0.5, 9, 2)
    made = [drafts_of(first, 0, 100), drafts_of(first, 1, 100), drafts_of(second, 0, 100)]
    assert made[0] != made[1] and made[0] != made[2]
    assert made[0] == drafts_of(Replay({0: answer, 1: answer}, 0.5, 9, 1), 0, 100)


def test_a_head_is_asked_and_what_it_says_is_replaced():
    request, asked = SimpleNamespace(id=4, output_ids=[5, 6]), []

    def guess(wanted, num_planned):
        asked.append((wanted, num_planned))
        return {4: [40, 41]}

    head = SimpleNamespace(name="mtp", guess=guess, **dict.fromkeys(METHODS, lambda *_: 3))
    replayed = ReplayedHead(head, Replay({4: [5, 6, 7, 8, 9]}, 1.0, 50, 1))
    assert replayed.guess([(request, 3)], 1) == {4: [7, 8]} and asked == [([(request, 3)], 1)]
    assert replayed.name == "mtp" and replayed.ready(request, 5) == replayed.seconds(1) == 3


def test_the_best_fixed_number_follows_from_the_steps():
    flat, steep = dict.fromkeys(range(1, 9), 1.0), {width: float(width) for width in range(1, 9)}
    assert best_draft(0.5, flat) == 7
    assert best_draft(0.5, steep) == 0
    assert best_draft(0.9, {1: 1.0, 2: 1.1, 3: 1.2, 4: 5.0}) == 2
    assert best_draft(0.0, {1: 1.0, 5: 0.9}) == 0


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    model = load(Case("qwen3_5", "f32", "bf16"), tmp_path_factory.mktemp("tiny"))
    sizes = dict(threads=1, max_requests=2, prefix_cache=False)
    plain = Engine(model, EngineOptions(**sizes))
    made = Bench(model, plain, EngineOptions(**sizes, speculate="lookup", draft=MAX_DRAFTS))
    yield made
    made.close()
    plain.close()


def test_answers_and_counts_of_a_comparison(bench):
    always, never, auto = (Setting(2, a, d) for a, d in ((1.0, 3), (0.0, 2), (0.9, None)))
    rows = {row.setting: row for row in compare(bench, [always, never, auto], 5, 21, 2)}
    assert not any(row.differing for row in rows.values())
    assert rows[always].tokens_per_step == 4.0 and rows[always].accepted == rows[always].drafted == 4 * 15
    assert rows[never].tokens_per_step == 1.0 and rows[never].accepted == 0 < rows[never].drafted
    assert all(row.decode > 0 and row.whole > 0 and row.tokens_per_second > 0 for row in rows.values())


def test_a_differing_answer_is_counted(bench, monkeypatch):
    step, vocab_size = bench.drafting.runner.step, bench.model.config.vocab_size

    def wrong(spans):
        tokens, *others = step(spans)
        return (tokens + 1) % vocab_size, *others

    monkeypatch.setattr(bench.drafting.runner, "step", wrong)
    [row] = compare(bench, [Setting(2, 0.5, 1)], 5, 30, 1)
    assert row.differing == 2


def test_room_for_all_requests_and_their_drafts():
    plan = Plan((0.5,), (1, 3), (128, 1000), 60, 70, 1)
    assert plan.longest == 1016
    assert plan.kv_tokens >= 3 * (60 + 70 + MAX_DRAFTS) + 1016


def test_the_command_measures_all_parts(capsys):
    assert main([*ARGUMENTS, *SMALL, "--contexts", "20", "--parts", "steps,answers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["steps"][0]["milliseconds"]) == [str(n) for n in range(1, 17)] and found["grouped"] is None
    assert {row["setting"]["requests"] for row in found["answers"]} == {1, 2}
    assert not any(row["differing"] for row in found["answers"])


def test_tables_show_ratios_and_differences():
    from rich.console import Console

    setting = dict(requests=4, acceptance=0.7, draft=None)
    row = dict(setting=setting, decode=1.5, whole=1.25, tokens_per_second=10.0, drafted=9, accepted=3)
    console = Console(record=True, width=100)
    console.print(answers_table([dict(row, tokens_per_step=2.0, differing=1)]))
    console.print(steps_table([dict(context=128, milliseconds={1: 10.0, 2: 11.0})]))
    text = console.export_text()
    assert "1.50x" in text and "70%" in text and "auto" in text and "1 ANSWERS DIFFER" in text
    assert "11.00 ms  1.10x" in text


def test_drafts_at_their_full_price(capsys, monkeypatch):
    monkeypatch.setattr("lockstep.lab.speculation.best_draft", lambda *_: 3)
    assert main([*ARGUMENTS, *SMALL, "--replay", "--parts", "answers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(row["drafted"] for row in found["answers"]) > 0
    assert not any(row["differing"] for row in found["answers"])


def test_a_difference_is_exit_code_one(capsys, monkeypatch):
    monkeypatch.setattr("lockstep.commands.bench_speculate.run", lambda *_: dict(answers=[dict(differing=1)]))
    assert main([*ARGUMENTS, *SMALL, "--json"]) == 1


@pytest.mark.parametrize(("args", "said"), [
    (["--acceptance", "101"], "--acceptance '101': expected whole numbers from 0 to 100"),
    (["--requests", "0"], "--requests '0': expected whole numbers from 1"), (["--contexts", "x"], "--contexts 'x'"),
    (["--requests", ","], "--requests ','"), (["--parts", "steps,all"], "--parts 'steps,all': expected some of steps"),
    (["--prompt", "5000"], "--contexts, --prompt and --tokens: 5144 tokens, the model has 4096"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(args, said, capsys):
    assert main([*ARGUMENTS, *args]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
