"""`lockstep parity --speculate`: answers with drafts equal those without, and differences are found and named."""

import json

import pytest

from lockstep.cli import main
from lockstep.lab import parity_drafts
from lockstep.lab.parity_drafts import NUM_DRAFTS, answer_tokens, run_draft_parity
from tests.promise.models import Case, load
from tests.speculation.faults import FAULTS

IDS = [3 + i * i % 90 for i in range(70)]


@pytest.fixture(scope="module", params=["qwen3", "qwen3_5"])
def model(request, tmp_path_factory):
    return load(Case(request.param, "f32", "bf16"), tmp_path_factory.mktemp("tiny"))


def compared(model):
    return list(run_draft_parity(model, IDS, answer_tokens(len(IDS), 100), 2))


def test_no_draft_changes_an_answer(model):
    found = compared(model)
    assert all(each.identical and each.max_abs_diff == 0 for each in found)
    assert [each.path.num_drafts for each in found] == [0, 0, *(n for n in NUM_DRAFTS for _ in range(4))]
    known = [each for each in found if each.path.source == "known answer"]
    assert all(0 < each.num_accepted < each.num_drafted for each in known)
    assert len({each.digest for each in found}) == 2  # of the two temperatures


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("noise_of_the_wrong_position", "tokens"),
        ("accepted_record_skipped", "logprobs"),
        ("rejected_record_applied", "alternatives"),
        ("stale_ring_row", "pages"),
        ("kept_without_its_drafts", "states"),
    ],
)
def test_a_planted_mistake_is_found_and_named(fault, named, tmp_path, monkeypatch):
    model = load(Case("qwen3_5", "f32", "bf16"), tmp_path)
    FAULTS[fault](monkeypatch)
    monkeypatch.setattr(parity_drafts, "NUM_DRAFTS", (4,))
    found = compared(model)
    assert any(named in each.differing for each in found)
    assert all(each.identical for each in found if not each.path.num_drafts)


@pytest.mark.parametrize(("length", "least"), [(1, 1), (70, 64), (64, 64), (65, 64), (63, 2), (4000, 1)])
def test_an_answer_ends_with_a_block(length, least):
    tokens = answer_tokens(length, least)
    assert least <= tokens < least + 64 and (length + tokens - 1) % 64 == 0


def test_the_command_prints_a_row_for_each_answer(capsys):
    assert main(["parity", "--threads", "1", "--speculate", "--tokens", "10", "--length", "60"]) == 0
    out = capsys.readouterr().out
    assert "60 tokens and 69 more, with and without drafts" in out
    assert "32 answers, the same with drafts and without" in " ".join(out.split())


def test_json_has_every_answer_and_the_exit_code_says_that_one_differs(capsys, monkeypatch):
    FAULTS["accepted_record_skipped"](monkeypatch)
    monkeypatch.setattr(parity_drafts, "NUM_DRAFTS", (2,))
    assert main(["parity", "--speculate", "--length", "60", "--tokens", "30", "--threads", "1", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8 and {row["threads"] for row in rows} == {1}
    assert {row["identical"] for row in rows} == {True, False}
    assert all(bool(row["differing"]) != row["identical"] for row in rows)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--speculate", "--first-difference", "cpu:reference"], "--speculate and --first-difference: expected one of"),
        (["--speculate", "--tokens", "0"], "--tokens"),
        (["--speculate", "--op", "nothing=reference"], "--op nothing=reference: the model has no op of this kind"),
        (["--tokens", "5"], "--tokens: expected only with --speculate"),
    ],
)
def test_bad_values_are_named(args, said, capsys):
    assert main(["parity", *args]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
