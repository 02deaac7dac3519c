"""The promise: whatever else happens, a request gives the bits it gives alone, one token at a time, on one thread.

Random schedules (`promise/schedule.py`) on tiny random models and on the bundled one; every logits row that is asked
for, every token and log-probability, the recurrent state after every step and every cached key and value are compared
with the reference (`promise/trace.py`). `promise/test_traffic.py` does the same to whole engines, whose own scheduler
preempts, shares prefixes and evicts them. LOCKSTEP_SOAK=minutes walks on with fresh seeds for so long.
"""

import os
import time
from collections import Counter

import pytest

from lockstep.engine.model import GROUPS
from tests.promise.models import CASES, LONG, library, load
from tests.promise.schedule import Teams, Walk, limits

STEPS = 30  # of a walk
PER_TOKEN = {"attention": "per_token", "elementwise": "per_token", "gated_delta": "per_token"}
WALKS = ({}, {"fused": False}, {"swaps": PER_TOKEN})
HAPPENS = (
    "batch mates",
    "prefill beside decode",
    "cut inside a page",
    "chunk over a page's end",
    "order changed",
    "rows out of order",
    "pages out of order",
    "pages used again",
    "slots used again",
    "finished",
    "cancelled",
    "recomputed",
    "past 2048",
    "pages before a window",
    *(f"{n} threads" for n in range(1, 9)),
)
NUM_STEPS = 400


@pytest.fixture(scope="module")
def teams():
    made = Teams()
    yield made
    made.close()


@pytest.fixture(scope="module")
def events():
    """Counts of what happened in all walks."""
    return Counter()


@pytest.fixture(scope="module", params=CASES, ids=str)
def subject(request, tmp_path_factory):
    """(case, model, library) of one case."""
    model = load(request.param, tmp_path_factory.mktemp("tiny"))
    return request.param, model, library(model, request.param.lengths)


def walk(subject, teams, seed, num_steps=None, **options):
    case, model, sequences = subject
    num_steps = num_steps or STEPS * (3 if LONG in case.lengths else 1)
    max_step_tokens, max_requests = ((600, 5), (130, 8), (48, 3))[seed % 3]
    if "swaps" in options:
        has = {*GROUPS, *(op.kind for op in model.program.ops)}
        options["swaps"] = {kind: name for kind, name in options["swaps"].items() if kind in has}
    most = limits(model, max_step_tokens, max_requests, 3 * sum(-(-n // 64) for n in case.lengths))
    return Walk(model, sequences, teams, seed, most, **options).run(num_steps)


def test_a_request_gives_the_same_bits_under_any_schedule(subject, teams, events):
    for seed, options in enumerate(WALKS):
        events.update(walk(subject, teams, seed, **options))


def test_every_kind_of_event_happened(events):
    missing = [what for what in HAPPENS if not events[what]]
    assert not missing and events["steps"] >= NUM_STEPS, f"{missing} did not happen; {dict(events)}"


@pytest.mark.skipif("LOCKSTEP_SOAK" not in os.environ, reason="a long run: set LOCKSTEP_SOAK=minutes")
def test_soak(teams, tmp_path):
    share, seed = 60 * float(os.environ["LOCKSTEP_SOAK"]) / len(CASES), int(time.time())
    for case in CASES:
        started, model = time.monotonic(), load(case, tmp_path / str(case))
        sequences = library(model, case.lengths)
        while time.monotonic() - started < share:
            seed += 1
            walk((case, model, sequences), teams, seed, 100, **WALKS[seed // 3 % len(WALKS)])
