"""A step of a loaded model compiles nothing, allocates nothing and runs no Python: counted over many mixes of
requests."""

import sys
import tracemalloc

import pytest
from numba.core import event
from numba.core.runtime import _nrt_python, rtsys

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import SamplingParams
from lockstep.native.kernel import Kernel
from tests.promise.models import Case, load

SAMPLING = [
    dict(),
    dict(temperature=0.9, top_p=0.9, min_p=0.01),
    dict(temperature=0.7, top_k=5, presence_penalty=1.0),
    dict(logit_bias={5: -3.0}, min_tokens=3),
    dict(logprobs=3),
    dict(prompt_logprobs=2),
]
WORDS_OF_THE_CALL = 2048  # bytes


@pytest.fixture(scope="module", params=[Case("qwen3_5", "q8_0", "bf16"), Case("qwen3", "q4_0", "q8")], ids=str)
def engine(request, tmp_path_factory):
    model = load(request.param, tmp_path_factory.mktemp("tiny"))
    made = Engine(model, EngineOptions(max_step_tokens=96, max_requests=6, threads=2, kv_tokens=2048))
    made.add([3], SamplingParams(max_tokens=1))
    made.step()  # the first call in a process matches the types of its arguments, in Python
    yield made
    made.close()


def mixed(engine):
    """Runs thirty requests of all lengths and kinds of sampling, which arrive while others run; returns the number of
    steps."""
    steps = 0
    for i in range(30):
        ids = [(7 * i + 3 * j) % 90 + 3 for j in range(1 + 37 * i % 180)]
        engine.add(ids, SamplingParams(max_tokens=3 + i % 9, seed=i, ignore_eos=True, **SAMPLING[i % len(SAMPLING)]))
        for _ in range(1 + i % 3):
            engine.step()
            steps += 1
    while engine.has_work:
        engine.step()
        steps += 1
    return steps


@pytest.fixture
def watched(engine, monkeypatch):
    """Counts of the native part of each step: [(native allocations, bytes that Python allocated, Python frames)]."""
    seen, run_step = [], engine.team.run

    def run(*arguments):
        frames, allocations = [], rtsys.get_allocation_stats().alloc
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        sys.setprofile(lambda frame, what, _: frames.append(frame.f_code.co_name) if what == "call" else None)
        try:
            run_step(*arguments)
        finally:
            sys.setprofile(None)
        seen.append(
            (rtsys.get_allocation_stats().alloc - allocations, tracemalloc.get_traced_memory()[1] - held, frames)
        )

    monkeypatch.setattr(engine.team, "run", run)
    _nrt_python.memsys_enable_stats()
    tracemalloc.start()
    yield seen
    tracemalloc.stop()
    _nrt_python.memsys_disable_stats()


def test_a_step_compiles_and_allocates_nothing_and_runs_no_python(engine, watched, monkeypatch):
    compiled = []
    monkeypatch.setattr(Kernel, "compile", lambda kernel, *_: compiled.append(kernel.name))
    most = []
    for _ in range(3):  # other threads of this process may allocate meanwhile, a step itself would do so each time
        watched.clear()
        with event.install_recorder("numba:compile") as recorder:
            steps = mixed(engine)
        assert len(watched) == steps > 60
        assert not compiled and not recorder.buffer
        assert {allocations for allocations, *_ in watched} == {0}
        assert {tuple(frames) for *_, frames in watched} == {("run", "alive", "run_step")}, "no Python below Team.run"
        most.append(max(held for _, held, _ in watched))
        if most[-1] < WORDS_OF_THE_CALL:
            return
    pytest.fail(f"a step allocated {most} bytes in each of three runs, allowed {WORDS_OF_THE_CALL}")
