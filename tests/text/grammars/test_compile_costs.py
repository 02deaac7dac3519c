"""Grammars are compiled in a worker process that can be killed: none takes time or memory from other requests."""

import gc
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from lockstep.text.grammars import structured
from lockstep.text.grammars.compile_costs import CompileCosts, TooSlow
from lockstep.text.grammars.structured import Grammars
from lockstep.text.job_process import Busy
from tests.text.grammar_cases import MIN, TOKENIZERS, allowed

BYTES = 192 << 20
SIZES = dict(seconds=0.5, num_bytes=BYTES)


def unchecked(schema):
    """The grammar of a schema without the checks of schemas.py."""
    return json.dumps({"grammars": [{"json_schema": schema}]})


ENDLESS = unchecked(dict(type="integer", multipleOf=99999989))  # minutes, and gigabytes
SMALL = structured.json_schema(dict(type="integer"))


@pytest.fixture(scope="module")
def costs():
    made = CompileCosts(500, {0: b"<|end|>", 7: b"<|mark|>"}, [0])
    yield made
    made.jobs.close()


@pytest.fixture
def grammars():
    made = Grammars(TOKENIZERS["byte_level"], {0}, TOKENIZERS["byte_level"].vocab_size)
    yield made
    made.close()


def test_what_a_grammar_costs(costs):
    small, larger = (
        costs.cost(grammar, 5, BYTES) for grammar in (SMALL, unchecked(dict(type="integer", multipleOf=19997)))
    )
    assert 0 < small.seconds < larger.seconds < 5 and 0 <= small.num_bytes < larger.num_bytes
    assert costs.cost(unchecked(dict(type="integer", multipleOf=19997)), larger.seconds / 2, BYTES) is None, "known"


def test_mistakes_are_value_errors_each_time(costs):
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown name"):
            costs.cost(structured.lark("start: nowhere"), **SIZES)


def test_tokens_may_be_named(costs):
    assert costs.cost(structured.lark("start: <|mark|> <[499]>"), **SIZES)
    with pytest.raises(ValueError, match="special token"):
        costs.cost(structured.lark("start: <|other|>"), **SIZES)


def test_a_grammar_that_takes_too_much_time_is_ended(costs):
    began = time.monotonic()
    assert costs.cost(ENDLESS, 0.2, BYTES) is None
    assert costs.cost(SMALL, **SIZES)
    assert time.monotonic() - began < 10


def test_a_grammar_that_takes_too_much_memory_is_ended(costs):
    with pytest.raises(ValueError, match="too much memory"):
        costs.cost(unchecked(dict(type="integer", multipleOf=999983)), 60, 1 << 20)


def test_a_grammar_that_recurs_without_end_is_a_value_error(costs):
    with pytest.raises(ValueError, match="too deeply"):
        costs.cost(unchecked(dict(type="integer", minimum=MIN, maximum=MIN)), 20, 4 << 30)
    assert costs.cost(SMALL, **SIZES)


def child_of(costs):
    """The id of the worker process, which is in a session of its own."""
    costs.jobs.start()
    return costs.jobs.process_id


def test_a_process_that_ends_is_started_again(costs):
    first = child_of(costs)
    os.kill(first, signal.SIGKILL)
    for i in range(5):  # some copies of it were there already
        assert costs.cost(structured.regex(f"after{i}"), **SIZES)
    assert child_of(costs) != first


def test_the_process_ends_with_the_object():
    made = CompileCosts(500, {}, [0])
    made.cost(SMALL, **SIZES)
    child = child_of(made)
    del made
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory in use is read from /proc")
def test_a_slow_grammar_delays_nobody_and_makes_no_others_mistake(grammars, monkeypatch):
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 1.0)
    before, found, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], threading.Event()

    def slow():
        began.set()
        try:
            grammars.mask(ENDLESS)
        except (TooSlow, Busy) as error:
            found.append(error)

    threads = [threading.Thread(target=slow) for _ in range(4)]
    for thread in threads:
        thread.start()
    began.wait()
    gaps, last = [], time.monotonic()
    for i in range(30):
        assert len(allowed(grammars.mask(structured.regex(f"[ab]{{{i + 1}}}"))([]))) > 1
        gaps.append(time.monotonic() - last)
        last = time.monotonic()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and {type(error) for error in found} == {TooSlow, Busy}, "only one may take so long"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert sorted(gaps)[len(gaps) // 2] < 1


def test_many_samples_of_one_grammar_are_bounded_together(grammars, monkeypatch):
    grammar = unchecked(dict(type="integer", multipleOf=19997))
    grammars.mask(grammar, 1)
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 2.0)
    with pytest.raises(TooSlow, match="did not compile 128 times within 2 s"):
        grammars.mask(grammar, 128)
