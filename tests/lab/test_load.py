"""`bench load`: workloads, times on a clock that tests move, and runs of the bundled model."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep import LLM
from lockstep.cli import main
from lockstep.engine.engine import Engine
from lockstep.engine.request import Request, SamplingParams
from lockstep.lab.load import Driver, Measured, Step, Visit, Workload, differing, measure, plain, prepare, spread

SMALL = dict(requests=10, rate=0.0, prompt=(20, 90), output=(5, 12))
ARGUMENTS = "bench load --threads 1 --requests 6 --rate 200 --prompt 10-30 --output 4-8".split()


# ------------------------------------------------------------ workloads


def test_arrivals_are_poisson_with_the_asked_rate_and_begin_at_zero():
    due = np.array(Workload(requests=20000, rate=8.0).due_times())
    gaps = np.diff(due)
    assert due[0] == 0 and (gaps > 0).all()
    assert abs(gaps.mean() - 1 / 8) < 0.005 and abs(gaps.std() - 1 / 8) < 0.005
    assert Workload(requests=3, rate=0.0).due_times() == [0, 0, 0]


def test_bursts_come_together_and_keep_the_rate():
    due = np.array(Workload(requests=20001, rate=8.0, burst=4).due_times())
    groups, sizes = np.unique(due, return_counts=True)
    assert set(sizes[:-1]) == {4} and sizes[-1] == 1
    assert abs(np.diff(groups).mean() - 4 / 8) < 0.03


def test_requests_depend_on_the_seed_only_and_keep_to_the_limits():
    workload = Workload(requests=200, prompt=(3, 6), output=(2, 4), shared_prefix=5, temperature=0.7, seed=3)
    made = workload.requests_of(50)
    assert made == Workload(**(vars(workload) | dict(rate=3.0, burst=7))).requests_of(50)
    assert made != Workload(**(vars(workload) | dict(seed=4))).requests_of(50)
    assert {len(ids) for ids, _ in made} == {8, 9, 10, 11} and {p.max_tokens for _, p in made} == {2, 3, 4}
    assert len({tuple(ids[:5]) for ids, _ in made}) == 1 and len({tuple(ids[5:]) for ids, _ in made}) > 150
    assert all(p.ignore_eos and p.temperature == 0.7 for _, p in made) and len({p.seed for _, p in made}) == 200
    assert max(i for ids, _ in made for i in ids) == 49 and workload.max_tokens == 15


@pytest.mark.parametrize(("wrong", "said"), [
    (dict(requests=0), "requests: expected a number from 1"), (dict(requests=1.5), "requests"),
    (dict(rate=float("nan")), "rate: expected a number from 0"), (dict(rate=-1), "rate"),
    (dict(rate=1e-300), r"rate: expected 0 \(all at once\) or at least 0.001, got 1e-300"), (dict(burst=0), "burst"),
    (dict(prompt=(0, 4)), "prompt: expected at least 1 token"), (dict(output=(5, 4)), "output"),
    (dict(shared_prefix=-1), "shared_prefix"), (dict(seed=-1), "seed"), (dict(temperature=-0.5), "temperature"),
])  # fmt: skip
def test_a_wrong_workload_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Workload(**wrong)


# ------------------------------------------------------------ times


class HandClock:
    """A clock that moves only when a test or `sleep` moves it."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class NaiveScheduler:
    """Two requests run, the others wait; scheduling takes 0.125 s."""

    def __init__(self, clock):
        self._clock, self.waiting, self.running = clock, [], []

    def add(self, request):
        self.waiting.append(request)

    def schedule(self):
        while self.waiting and len(self.running) < 2:
            self.running.append(self.waiting.pop(0))
        self._clock.now += 0.125
        return [(request, 1) for request in self.running]


class NaiveExecutor:
    """The native step, of 0.5 s."""

    def __init__(self, clock):
        self._clock = clock

    def run(self, step, clock=None):
        self._clock.now += 0.5


class NaiveEngine:
    """Gives each running request a token in every step of 1 s: building a batch takes 0.25 s, taking tokens 0.125 s."""

    def __init__(self, clock):
        self._clock, self.scheduler = clock, NaiveScheduler(clock)
        self.runner = SimpleNamespace(executor=NaiveExecutor(clock))

    @property
    def has_work(self):
        return bool(self.scheduler.waiting or self.scheduler.running)

    def step(self):
        plan = self.scheduler.schedule()
        self._clock.now += 0.25
        self.runner.executor.run(None)
        self._clock.now += 0.125
        for request, _ in plan:
            request.output_ids.append(7)
            if len(request.output_ids) == request.params.max_tokens:
                request.finish_reason = "length"
                self.scheduler.running.remove(request)
        return [request for request, _ in plan]


def visit(number, due, num_tokens):
    return Visit(Request(number, [1, 2], SamplingParams(max_tokens=num_tokens)), due)


def drive(visits, concurrency=None):
    """Runs visits on a naive engine; returns (engine, steps, clock)."""
    clock = HandClock()
    engine = NaiveEngine(clock)
    return engine, Driver(engine, visits, concurrency, clock, clock.sleep).run(), clock


def test_times_count_from_the_arrival_and_the_driver_sleeps_until_the_next():
    visits = [visit(0, 0.0, 2), visit(1, 0.5, 1), visit(2, 5.25, 1)]
    _, steps, clock = drive(visits)
    assert [v.token_times for v in visits] == [[1.0, 2.0], [2.0], [6.25]]
    assert [v.first_token for v in visits] == [1.0, 1.5, 1.0]  # the second came during the first step
    assert visits[0].between_tokens == [1.0] and visits[0].whole_answer == 2.0
    assert clock.slept == [3.25] and [s.started for s in steps] == [0.0, 1.0, 5.25]


def test_every_part_of_a_step_is_timed_and_the_engine_is_left_as_it_was():
    engine, steps, _ = drive([visit(i, 0.0, 1) for i in range(3)])
    first = steps[0]
    assert (first.started, first.scheduled, first.entered, first.left, first.ended) == (0.0, 0.125, 0.375, 0.875, 1.0)
    assert (first.num_requests, first.num_tokens) == (2, 2)
    assert (first.num_running, first.num_staying, first.num_waiting) == (2, 0, 1)
    assert "schedule" not in vars(engine.scheduler) and "run" not in vars(engine.runner.executor)


def test_a_request_beyond_the_concurrency_arrives_when_a_place_is_free():
    visits = [visit(0, 0.0, 3), visit(1, 0.25, 1), visit(2, 0.5, 1), visit(3, 9.0, 1)]
    _, steps, _ = drive(visits, concurrency=1)
    assert [v.arrived for v in visits] == [0.0, 3.0, 4.0, 9.0]
    assert [v.first_token for v in visits] == [1.0, 1.0, 1.0, 1.0]
    assert max(s.num_running + s.num_waiting for s in steps) == 1
    with pytest.raises(ValueError, match="concurrency: expected at least 1, got 0"):
        drive([visit(0, 0.0, 1)], concurrency=0)


def test_figures_of_a_run_made_by_hand():
    visits = [visit(0, 0.0, 2), visit(1, 0.0, 2), visit(2, 0.0, 1)]
    _, steps, _ = drive(visits, concurrency=2)
    visits[2].request.num_cached = 1
    found = plain(Workload(), Measured(visits, steps, dict(preempted=4, query_tokens=8, hit_tokens=2)))
    assert found["seconds"] == 3 and found["rates"] == dict(
        requests=1, computed_prompt_tokens=5 / 3, output_tokens=5 / 3
    )
    assert found["totals"]["cached_prompt_tokens"] == 1
    assert found["hit_rate"] == 0.25 and found["counts"]["preempted"] == 4 and found["num_held_back"] == 1
    assert found["steps"]["shares"] == dict(scheduling=0.125, building=0.25, native=0.5, taking=0.125)
    assert found["steps"]["host_share"] == 0.5 and found["steps"]["busy"] == 1 and found["held_back_ms"]["max"] == 2000
    assert found["first_token_ms"]["p99"] == 1000 and found["between_tokens_ms"]["p50"] == 1000
    assert [v["token_times"] for v in found["visits"]] == [[1.0, 2.0], [1.0, 2.0], [3.0]]


def test_percentiles_are_values_that_occurred():
    found = spread([i / 1000 for i in range(200, 0, -1)])
    assert found == pytest.approx(dict(mean=100.5, p50=100, p95=190, p99=198, max=200))
    assert spread([]) == {}


def test_a_step_without_tokens_has_no_native_part():
    step = Step(1.0, 1.5, 1.5, 1.5, 1.75)
    shares = plain(Workload(), Measured([finished()], [step], dict(preempted=0)))["steps"]["shares"]
    assert shares["native"] == 0 and shares["scheduling"] == pytest.approx(2 / 3)


def finished():
    made = visit(0, 0.0, 1)
    made.arrived, made.token_times = 0.0, [1.75]
    return made


# ------------------------------------------------------------ the bundled model


@pytest.fixture(scope="module")
def llm():
    llm = LLM(threads=1, max_context=1200, max_requests=8, max_step_tokens=128, kv_tokens=1280)
    yield llm
    llm.close()


def test_a_run_answers_everything_and_each_request_alone_is_the_same(llm):
    visits = prepare(llm.engine, Workload(**SMALL, temperature=0.8))
    found = measure(llm.engine, visits, concurrency=5)
    assert [len(v.token_times) for v in visits] == [v.request.params.max_tokens for v in visits]
    assert max(s.num_requests for s in found.steps) == 5 and found.counts["preempted"] == 0
    assert found.counts["query_tokens"] == sum(len(v.request.prompt_ids) for v in visits)
    assert sum(s.num_tokens for s in found.steps) == sum(v.request.num_tokens - 1 for v in visits)
    assert differing(llm.engine, visits, 100) == ([], 10) and differing(llm.engine, visits, 3) == ([], 3)


def test_one_changed_bit_or_token_is_found(llm):
    visits = prepare(llm.engine, Workload(**SMALL | dict(requests=3)))
    measure(llm.engine, visits)
    first, _, last = (v.request for v in visits)
    first.logprobs[2] = float(np.nextafter(np.float32(first.logprobs[2]), np.float32(0)))
    last.output_ids[1] ^= 1
    assert differing(llm.engine, visits, 3) == ([first.id, last.id], 3)
    assert differing(llm.engine, visits, 1) == ([first.id], 1)


def test_alone_is_without_batch_mates_and_without_a_cache(llm, monkeypatch):
    made = []

    class Noted(Engine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("lockstep.lab.load.Engine", Noted)
    visits = prepare(llm.engine, Workload(**SMALL | dict(requests=2)))
    measure(llm.engine, visits)
    differing(llm.engine, visits, 2)
    assert [(e.runner.limits.max_requests, e.scheduler.prefix) for e in made] == [(1, None)]


def test_preemptions_and_cache_hits_are_counted(llm):
    visits = prepare(llm.engine, Workload(requests=6, rate=0.0, prompt=(20, 90), output=(150, 300)))
    crowded = measure(llm.engine, visits)
    assert crowded.counts["preempted"] == sum(v.request.num_preemptions for v in visits) > 0
    assert differing(llm.engine, visits, 6) == ([], 6)
    workload = Workload(requests=4, rate=0.0, prompt=(20, 40), output=(5, 9), shared_prefix=600, seed=1)
    shared = plain(workload, measure(llm.engine, prepare(llm.engine, workload)))
    assert 0.3 < shared["hit_rate"] < 0.75 and shared["counts"]["hit_tokens"] % 64 == 0


def test_a_request_that_can_never_run_is_refused_before_any_runs(llm):
    workload = Workload(requests=20, rate=0.0, prompt=(1000, 1190), output=(50, 100))
    with pytest.raises(ValueError, match="more than the context of 1200 tokens"):
        prepare(llm.engine, workload)
    assert not llm.engine.has_work


# ------------------------------------------------------------ the command


def test_the_report_fits_eighty_columns(capsys):
    assert main([*ARGUMENTS, "--shared-prefix", "1000", "--concurrency", "2", "--burst", "3", "--check"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for said in (
        "6 requests, 200 a second in groups of 3",
        "first token",
        "between tokens",
        "p99",
        "preemptions   0",
        "up to 2 requests under way",
        "held back",
        "check         0 of 6 differ",
    ):
        assert said in out


def test_json_and_the_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "load.png"
    assert main([*ARGUMENTS, "--json", "--no-prefix-cache", "--plot", str(path), "--max-requests", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["requests"] == 6 == len(found["visits"]) and found["hit_rate"] is None
    assert found["about"]["model"] == "bundled model" and found["about"]["weights"] == ["bf16"]
    assert found["engine"]["max_requests"] == 2 and not found["engine"]["prefix_cache"]
    assert all(a["due"] <= b["due"] for a, b in itertools.pairwise(found["visits"]))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_difference_is_exit_code_one(capsys, monkeypatch):
    monkeypatch.setattr("lockstep.lab.load.differing", lambda engine, visits, sample: ([3], 4))
    assert main([*ARGUMENTS, "--check"]) == 1
    assert "1 of 4 differ" in capsys.readouterr().out


@pytest.mark.parametrize(("args", "said"), [
    (["--prompt", "5-2"], "--prompt '5-2': expected MIN-MAX or one number"), (["--output", "x"], "--output 'x'"),
    (["--prompt", "0-4"], "--prompt '0-4'"), (["--output", "4-"], "--output '4-'"),
    (["--rate", "nan"], "rate: expected a number from 0"),
    (["--concurrency", "0"], "--concurrency"), (["--requests", "0"], "requests: expected a number from 1"),
    (["--prompt", "5000"], "together up to 5064 tokens, but the model's context is 4096"),
    (["--prompt", "300", "--kv-tokens", "128"], "together up to 364 tokens, but --kv-tokens hold 128"),
    (["no.gguf"], "no.gguf: no such folder or file"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(args, said, capsys):
    assert main(["bench", "load", *args]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_bench_itself_is_still_a_command_with_a_model(capsys):
    assert main(["bench", "--help"]) == 0
    assert "--quick" in capsys.readouterr().out
    assert main(["bench", "load", "--help"]) == 0
    assert "--rate" in capsys.readouterr().out
    assert main(["bench", "./load", "--quick"]) == 2
    assert "./load: no such folder or file" in capsys.readouterr().err
