"""What an engine compiles and packs is known before it starts."""

import pytest

from lockstep import LLM
from lockstep.engine import preparation
from lockstep.engine.preparation import Runnable, compile_missing, needed_kernels
from lockstep.engine.selfcheck import check as selfcheck
from tests.kernels import shared_kernels
from tests.models import tiny
from tests.models.cases import CASES


class Missing:
    """A kernel that is not in the cache."""

    is_cached = False

    def __init__(self, name):
        self.name = name

    def compile(self, on_compile=None):
        if on_compile is not None:
            on_compile(self.name)


def test_each_kernel_that_is_missing_is_counted_once():
    one, two, told = Missing("one"), Missing("two"), []
    compile_missing([one, two, one], lambda *report: told.append(report))
    assert told == [("compiling", 0, 2), ("compiling", 1, 2), ("compiling", 2, 2)]
    compile_missing([one, two], None)
    compile_missing([], told.append)


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """The reports of two loads of a model that was never loaded before, and the LLM of the second."""
    folder, told = tmp_path_factory.mktemp("prepared"), ([], [])
    model = tiny.write(folder / "m", CASES["qwen3"], tiny.tensors(CASES["qwen3"], 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCKSTEP_CACHE", str(shared_kernels(folder / "cache")))
        for reports in told:
            llm = LLM(
                str(model), threads=1, max_requests=1, speculate="lookup", progress=lambda *r, to=reports: to.append(r)
            )
            llm.close()
    return told, llm


def test_all_bytes_are_packed_at_first_and_loaded_afterwards(loads):
    (first, second), _ = loads
    packed = [(done, total) for kind, done, total in first if kind == "packing"]
    loaded = [(done, total) for kind, done, total in second if kind == "loading"]
    assert packed == loaded and packed[-1][0] == packed[-1][1] and len(packed) > 4
    assert packed == sorted(packed) and len({total for _, total in packed}) == 1
    assert "loading" not in {kind for kind, *_ in first} and "packing" not in {kind for kind, *_ in second}


def test_the_kernels_of_the_program_and_of_its_self_check_are_those_that_run(loads, tmp_path, monkeypatch):
    runner = loads[1].engine.runner
    runnable = Runnable(runner.program, runner.executor.backend, runner.model.store)
    own = {runnable.table[op.kind].kernel for op in runnable.program.ops}
    assert set(needed_kernels(runnable)) == own, "its self-check has passed"
    monkeypatch.setattr(selfcheck, "mark_of", lambda *_: tmp_path / "absent")
    monkeypatch.setattr(selfcheck, "cache_subfolder", lambda _: tmp_path)
    used = set()
    monkeypatch.setattr(preparation.selfcheck, "compare", lambda *_: None)
    monkeypatch.setattr("lockstep.runtime.executor.compile_kernels", used.update)
    selfcheck.check(runnable.program, runnable.table)
    assert used and own | used == set(needed_kernels(runnable))
