"""Answers that go on from any of their tokens are the same as without an interruption. `python -m tests.resume` does
the same with 20,000 of them.

What is compared, bit for bit: tokens, log-probabilities and alternatives, text, the text that was certain at the seam,
how the answer ended, calls of masks, logits, recurrent states, keys and values. The last tests plant mistakes, each of
which must be seen.
"""

from collections import Counter

import pytest

from tests.resume.faults import FAULTS
from tests.resume.proof import Whole, lots, run_lot, with_stops
from tests.speculation.proof import Lot
from tests.speculation.subjects import bundled, tiny
from tests.speculation.wishes import wishes

NUM_WISHES = 26
HAPPENS = (
    "ended by given tokens",
    "under a mask",
    "with penalties",
    "within min_tokens",
    "recomputed and preempted",
    "several samples",
    "prefix hits",
    "with drafts",
    "int stops",
    "str stops",
    "temperature 0",
    "temperature 1",
)


@pytest.fixture(scope="module")
def whole():
    """Answers of the bundled model that nothing interrupts."""
    subject = with_stops(bundled())
    yield Whole(subject, wishes(subject, 2, NUM_WISHES))
    subject.close()


def test_answers_go_on_as_if_nothing_had_happened(whole, tmp_path):
    events = Counter()
    for lot in lots(whole, 3, 2, NUM_WISHES):
        report = run_lot(whole, lot, tmp_path)
        assert not report.differences
        events += report.events
    missing = [what for what in HAPPENS if not events[what]]
    assert not missing and events["points"] >= 40, f"{missing} did not happen; {dict(events)}"


@pytest.mark.parametrize("config", ["qwen3_windows", "qwen3_5"])
def test_tiny_models_answers_go_on(config, tmp_path):
    subject = tiny(config, tmp_path / "model", "q8_0", "q8")
    made = Whole(subject, wishes(subject, 2, 12))
    assert not [what for lot in lots(made, 1, 2, 12) for what in run_lot(made, lot, tmp_path).differences]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_seen(whole, fault, tmp_path, monkeypatch):
    FAULTS[fault](monkeypatch)
    assert run_lot(whole, Lot("off", None, "roomy", tuple(range(NUM_WISHES)), 7), tmp_path).differences
