"""Speculation changes nothing but the time. `python -m tests.speculation` does the same with 10,000 requests.

Random requests, with every kind of draft there is and some that there should not be, are compared bit for bit with the
same requests without drafts: answers, log-probabilities, logits, recurrent states, keys and values, named blocks, kept
states. The last tests plant mistakes, each of which must be seen.
"""

import shutil
from collections import Counter

import pytest

from lockstep.engine.speculation.drafts import MAX_DRAFTS
from lockstep.text.grammars.mask import GrammarMask
from tests.speculation.faults import FAULTS, state_lost
from tests.speculation.long_context import answers
from tests.speculation.one_by_one import one_by_one
from tests.speculation.proof import Lot, Menu, lots, run_lot, run_on
from tests.speculation.subjects import bundled, tiny
from tests.speculation.wishes import wishes

NUM_WISHES, LOT_SIZE, NUM_REQUESTS = 60, 8, 300
HAPPENS = (
    "preempted requests",
    "cancelled",
    "prefix hits",
    "disk_loaded",
    "pages_evicted",
    "right drafts under a mask",
    *(f"drafts from {source}" for source in ("lookup", "prediction", "earlier_answers", "grammar", "model", "mtp")),
    "int stops",
    "str stops",
    "length",
    "embedded",
    "temperature 0",
    "temperature 0.8",
    "temperature 1",
    *(f"width {width}" for width in range(2, MAX_DRAFTS + 2)),
    *(f"rejected at {place}" for place in range(MAX_DRAFTS)),
)


@pytest.fixture(scope="module")
def menu():
    """The Menu of the bundled model."""
    subject = bundled()
    yield Menu(subject, wishes(subject, 0, NUM_WISHES))
    subject.close()


def test_the_bundled_models_answers_and_memory_are_the_same_with_drafts(menu, tmp_path):
    events = Counter()
    for lot in lots(menu, 0, LOT_SIZE):
        report = run_lot(menu, lot, tmp_path)
        assert not report.differences
        # without a number of drafts what happens follows a clock
        events += report.events if lot.num_drafts else Counter(requests=report.events["requests"])
    missing = [what for what in HAPPENS if not events[what]]
    assert not missing and events["requests"] >= NUM_REQUESTS, f"{missing} did not happen; {dict(events)}"


TINY = [("qwen3", "q8_0", "q8"), ("qwen3_windows", "bf16", "f32"), ("qwen3_5", "q4_0", "q8")]


@pytest.mark.parametrize("config, weights, kv_dtype", TINY)
def test_tiny_models_answers_and_memory_are_the_same_with_drafts(config, weights, kv_dtype, tmp_path):
    subject = tiny(config, tmp_path / "model", weights, kv_dtype)
    menu = Menu(subject, wishes(subject, 1, 20))
    assert not [what for lot in lots(menu, 1, 3) for what in run_lot(menu, lot, tmp_path).differences]


@pytest.mark.parametrize("source, widths", [("lookup", (8,)), ("mtp", (4, 8))])
def test_a_long_text_is_the_same_with_drafts(menu, source, widths, tmp_path):
    """A text of 4,000 tokens, nearly the context of the bundled model. The run with the most drafts finds no prefix."""
    text = menu.subject.texts[0]
    prompt_ids = (text * (3800 // len(text) + 1))[:3800]
    made = list(answers(menu.subject, prompt_ids, 200, source, widths, tmp_path))
    assert not any(answer.differing for answer in made)
    assert all(answer.digests == made[i % 2].digests for i, answer in enumerate(made))
    assert all(answer.request.num_accepted > 20 for answer in made[2:]) and len(made) == 2 * (1 + len(widths))


@pytest.mark.parametrize("company", ["crowded", "tight", "disk"])
def test_wrong_drafts_delay_no_request(menu, company, tmp_path, monkeypatch):
    """Each step computes the same known tokens of the same requests as without drafts, with preemptions and cancels."""
    monkeypatch.setattr(GrammarMask, "forced", lambda self, output_ids, drafts: [])  # they would be right
    on, off = (
        run_on(menu, Lot(source, number, company, tuple(range(20)), 3), tmp_path / source)
        for source, number in (("wrong", 5), ("off", None))
    )
    assert on.watch.steps == off.watch.steps and on.watch.events["drafts"]
    assert on.watch.engine.counts() | dict(drafts=0) == off.watch.engine.counts()


# ---------------------------------------------------------------- one after another


@pytest.fixture(scope="module")
def sequence(menu, tmp_path_factory):
    """(wishes, their OneByOne without drafts, the folder in which prefixes were kept)."""
    asked, folder = wishes(menu.subject, 6, 10), tmp_path_factory.mktemp("off")
    return asked, one_by_one(menu.subject, asked, folder), folder


def run_again(menu, sequence, folder, source, num_drafts):
    """The same with drafts of a source that knows the answers."""
    asked, off, _ = sequence
    return one_by_one(menu.subject, asked, folder, source, num_drafts, lambda turn: off.found[turn][0])


SOURCES = [
    ("auto", None),
    ("auto", 7),
    ("lookup", 9),
    ("mtp", 3),
    ("model", 5),
    ("mostly right", MAX_DRAFTS),
    ("wrong", 5),
]


@pytest.mark.parametrize("source, num_drafts", SOURCES)
def test_one_after_another_the_same_is_found_and_kept_and_evicted(menu, sequence, tmp_path, source, num_drafts):
    off, on = sequence[1], run_again(menu, sequence, tmp_path, source, num_drafts)
    assert on.found == off.found
    assert on.counts == off.counts
    assert (on.kept, on.files) == (off.kept, off.files)
    if num_drafts:  # without a number how many there are follows a clock
        assert (on.num_right > 20) == (source != "wrong")
    assert all(count[name] for count in off.counts for name in ("hit_tokens", "pages_evicted", "states_evicted"))
    assert off.counts[1]["disk_loaded"]


@pytest.mark.parametrize("source, num_drafts", [("mtp", 3), ("lookup", None)])
def test_what_was_kept_without_drafts_is_found_with_them(menu, sequence, tmp_path, source, num_drafts):
    """The first engine with drafts finds on disk the prefixes that the second engine without drafts found."""
    off, folder = sequence[1:]
    on = run_again(menu, sequence, shutil.copytree(folder, tmp_path / "kept"), source, num_drafts)
    half = len(off.found) // 2
    assert on.found[:half] == on.found[half:] == off.found[half:]
    assert on.files == off.files


def test_prefixes_that_are_found_no_more_are_missed(menu, sequence, tmp_path, monkeypatch):
    state_lost(monkeypatch)
    on = run_again(menu, sequence, tmp_path, "right", 7)
    assert [found[:-1] for found in on.found] == [found[:-1] for found in sequence[1].found]  # no bit differs
    assert on.found != sequence[1].found and on.kept != sequence[1].kept


# ---------------------------------------------------------------- what is wrong must be seen


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_seen(menu, fault, tmp_path, monkeypatch):
    FAULTS[fault](monkeypatch)
    assert any(run_lot(menu, lot, tmp_path).differences for lot in lots(menu, 0, LOT_SIZE))
