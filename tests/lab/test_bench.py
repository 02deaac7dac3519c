"""`bench`: what it says while it measures, and what it compares."""

import json
import statistics

import pytest

from lockstep.cli import main
from lockstep.lab import model_speed
from lockstep.lab.model_speed import chunk_sizes, paired

SMALL = ("--prompts", "20", "--contexts", "8", "--repeat", "1", "--threads", "1")


@pytest.fixture
def no_ceiling(monkeypatch):
    """The ceiling is given: it takes seconds to measure, and is another one each time."""
    from lockstep.lab.ceiling import Ceiling

    monkeypatch.setattr("lockstep.lab.ceiling.measure", lambda team: Ceiling(1e10, 1e11, 1e10))


@pytest.mark.parametrize(("num_tokens", "largest", "sizes"), [
    (20, 512, [64]), (64, 512, [64]), (65, 512, [64, 512]), (512, 512, [64, 512]), (1000, 512, [64, 512]),
    (1000, 64, [64]),
])  # fmt: skip
def test_no_two_chunks_are_the_same(num_tokens, largest, sizes):
    assert chunk_sizes(num_tokens, largest) == sizes


def test_each_measurement_has_a_line_before_it_off_a_terminal_too(capsys, no_ceiling):
    assert main(["bench", *SMALL, "--json"]) == 0
    printed = capsys.readouterr()
    found, said = json.loads(printed.out), printed.err.splitlines()
    assert list(found["per_token"]["ratios"]) == ["chunks of 64"] and found["prefill"].keys() == {"20"}
    stages = [line.removeprefix("lockstep: ") for line in said if line.startswith("lockstep: ")]
    assert stages == [
        "the machine's ceiling",
        "20 tokens, one at a time",
        "20 tokens, one at a time against chunks of 64",
        "prefill of 20 tokens",
        "decode after 8 tokens",
        *(f"{name}, per token against batched" for name in found["switches"]),
        "a profile of prefill",
        "a profile of decode",
        "the machine's ceiling again",
    ]


@pytest.mark.parametrize(("seconds", "lines"), [(1.0, []), (30.0, ["pair 2 of 3", "pair 3 of 3"])])
def test_a_long_comparison_has_a_line_for_each_pair(seconds, lines):
    said = []
    found = paired(lambda: seconds, lambda: seconds / 2, 3, said.append)
    assert said == lines and found.ratio == statistics.median([2.0] * 3)
    assert model_speed.LONG_SECONDS <= 10
