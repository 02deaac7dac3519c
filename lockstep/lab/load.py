"""Measures latencies and throughput of requests that arrive over time, driven through an engine in one thread.

Between two steps the driver gives the engine all requests that are due. So an arrival waits for the end of a step, as
behind a server, and no other thread takes the interpreter from the engine. Latencies count from the arrival, not from
the moment at which the engine gets the request. Times are seconds since the beginning of the run.
"""

import contextlib
import heapq
import math
import time
from collections import deque
from dataclasses import asdict, dataclass, field

import numpy as np

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import Request, SamplingParams
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

LOWEST_RATE = 1e-3  # arrivals per second; with fewer a run would seem to hang
PERCENTILES = (50, 95, 99)
LIMITS = {  # of a workload's numbers: (type, least, largest)
    "requests": (int, 1, 1_000_000),
    "rate": ((int, float), 0, 1e6),
    "burst": (int, 1, 1_000_000),
    "shared_prefix": (int, 0, 1 << 24),
    "seed": (int, 0, (1 << 63) - 1),
}


@dataclass(frozen=True)
class Workload:
    """The requests of a run, and when they arrive. Equal workloads make equal requests. ValueError for a value that is
    not allowed.

    requests: their number. rate: arrivals per second on average, at random moments (Poisson); 0: all at once. burst:
    requests that arrive together; with it groups come at random moments. prompt, output: least and most tokens, drawn
    uniformly. shared_prefix: tokens in front of every prompt, the same for all. temperature: as in SamplingParams; each
    request has a seed of its own. An answer has exactly the drawn number of tokens: end tokens do not end it.
    """

    requests: int = 192
    rate: float = 80.0
    burst: int = 1
    prompt: tuple[int, int] = (32, 512)
    output: tuple[int, int] = (16, 64)
    shared_prefix: int = 0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kind, low, high) in LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name}: expected a number from {low} to {high:g}, got {value!r}")
        if 0 < self.rate < LOWEST_RATE:
            raise ValueError(f"rate: expected 0 (all at once) or at least {LOWEST_RATE}, got {self.rate!r}")
        for name in ("prompt", "output"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name}: expected at least 1 token and the least before the most, got {low}-{high}")
        SamplingParams(temperature=self.temperature)

    @property
    def max_tokens(self):
        """The most that a prompt and its answer may have together."""
        return self.shared_prefix + self.prompt[1] + self.output[1]

    def due_times(self):
        """The times at which the requests are due, ascending; the first is 0."""
        if not self.rate:
            return [0.0] * self.requests
        num_groups = -(-self.requests // self.burst)
        gaps = np.random.default_rng([self.seed, 1]).exponential(self.burst / self.rate, num_groups)
        return np.repeat(np.cumsum(gaps) - gaps[0], self.burst)[: self.requests].tolist()

    def requests_of(self, vocab_size):
        """[(token ids of the prompt, SamplingParams), ...] in order of arrival."""
        rng = np.random.default_rng([self.seed, 2])
        prefix = rng.integers(0, vocab_size, self.shared_prefix).tolist()
        made = []
        for i in range(self.requests):
            length, answer = (int(rng.integers(low, high + 1)) for low, high in (self.prompt, self.output))
            params = SamplingParams(max_tokens=answer, temperature=self.temperature, seed=i, ignore_eos=True)
            made.append((prefix + rng.integers(0, vocab_size, length).tolist(), params))
        return made


@dataclass(eq=False)
class Visit:
    """One request and its times. due: when it should arrive; arrived: later than due where `concurrency` held it back;
    token_times: when each token of its answer was there."""

    request: Request
    due: float
    arrived: float = math.nan
    token_times: list[float] = field(default_factory=list)

    @property
    def first_token(self):
        return self.token_times[0] - self.arrived

    @property
    def whole_answer(self):
        return self.token_times[-1] - self.arrived

    @property
    def between_tokens(self):
        return np.diff(self.token_times).tolist()


@dataclass
class Step:
    """One step of the engine: the moments at which its parts ended, and its numbers.

    scheduled: the schedule is made; entered: the batch is built and the native step begins; left: the native step has
    ended; ended: the tokens are taken. num_requests, num_tokens: of the step; num_running, num_waiting: requests that
    were admitted, and that waited; num_staying: requests that still run after the step.
    """

    started: float
    scheduled: float = 0.0
    entered: float = 0.0
    left: float = 0.0
    ended: float = 0.0
    num_requests: int = 0
    num_tokens: int = 0
    num_running: int = 0
    num_staying: int = 0
    num_waiting: int = 0


class StepClock:
    """A context that times the parts of an engine's steps. steps: a Step for each call of `step`."""

    def __init__(self, engine, now) -> None:
        self._engine, self._now, self.steps = engine, now, []
        self._schedule, self._run = engine.scheduler.schedule, engine.runner.executor.run

    def __enter__(self):
        self._engine.scheduler.schedule, self._engine.runner.executor.run = self._scheduling, self._running
        return self

    def __exit__(self, *error) -> None:
        del self._engine.scheduler.schedule, self._engine.runner.executor.run

    def step(self):
        """Runs one step; returns the requests that it changed."""
        step = Step(self._now())
        self.steps.append(step)
        changed = self._engine.step()
        step.ended, step.num_staying = self._now(), len(self._engine.scheduler.running)
        return changed

    def _scheduling(self):
        plan, step, scheduler = self._schedule(), self.steps[-1], self._engine.scheduler
        step.num_requests, step.num_tokens = len(plan), sum(count for _, count in plan)
        step.num_running, step.num_waiting = len(scheduler.running), len(scheduler.waiting)
        step.scheduled = step.entered = step.left = self._now()  # a step without tokens ends here
        return plan

    def _running(self, *args) -> None:
        self.steps[-1].entered = self._now()
        self._run(*args)
        self.steps[-1].left = self._now()


class Driver:
    """Gives requests to an engine when they are due, and runs it until all are answered.

    visits: in order of due time. concurrency: the most requests under way, None for any number; a request that is due
    while so many are under way arrives when one of them ends, as from a client with so many connections. clock, sleep:
    as in the `time` module.
    """

    def __init__(self, engine, visits, concurrency=None, clock=time.perf_counter, sleep=time.sleep) -> None:
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        self.engine, self._left, self._sleep = engine, deque(visits), sleep
        self._visit_of = {visit.request.id: visit for visit in visits}
        # the free connections of clients, each by the moment since which it is free
        self._free_since = [0.0] * (concurrency or len(visits))
        started = clock()
        self._now = lambda: clock() - started

    def run(self):
        """Runs until all requests are answered; returns the steps."""
        with StepClock(self.engine, self._now) as timed:
            while self._left or self.engine.has_work:
                self._send(self._now())
                if self.engine.has_work:
                    changed = timed.step()
                    self._note(changed, timed.steps[-1].ended)
                else:
                    self._sleep(max(0.0, self._left[0].due - self._now()))
        return timed.steps

    def _send(self, now) -> None:
        while self._left and self._free_since and self._left[0].due <= now:
            visit = self._left.popleft()
            visit.arrived = max(visit.due, heapq.heappop(self._free_since))
            self.engine.scheduler.add(visit.request)

    def _note(self, changed, now) -> None:
        for request in changed:
            assert request.error is None, request.error
            visit = self._visit_of[request.id]
            visit.token_times += [now] * (len(request.output_ids) - len(visit.token_times))
            if request.finish_reason is not None:
                heapq.heappush(self._free_since, now)


@dataclass(frozen=True)
class Measured:
    """A run: its visits and steps, and how much the engine's counters in COUNTED rose."""

    visits: list[Visit]
    steps: list[Step]
    counts: dict[str, int]


def prepare(engine, workload):
    """The Visits of a workload, in order of arrival. ValueError if one of its requests can never run."""
    prompts = workload.requests_of(engine.model.config.vocab_size)
    return [
        Visit(engine.make(ids, params)[0], due)
        for (ids, params), due in zip(prompts, workload.due_times(), strict=True)
    ]


def measure(engine, visits, concurrency=None):
    """Runs visits (of `prepare`) on an idle engine; returns a Measured."""
    _answer(engine, visits[0].request, cache_salt="warm-up")  # with a salt of its own, so that its prefix is not reused
    before = engine.counts()
    steps = Driver(engine, visits, concurrency).run()
    after = engine.counts()
    return Measured(visits, steps, {name: after[name] - before.get(name, 0) for name in COUNTED if name in after})


# the engine's counters that only rise; engines without a prefix cache or states lack some of them
COUNTED = (
    "preempted",
    "query_tokens",
    "hit_tokens",
    "recovered_tokens",
    "kept_states",
    "pages_evicted",
    "states_evicted",
)


def differing(engine, visits, sample):
    """Runs a sample of answered requests again, each alone, in a new engine for one request without a prefix cache;
    returns (ids of requests whose tokens or log-probabilities differ in a bit, the size of the sample)."""
    chosen = [visits[i] for i in np.unique(np.linspace(0, len(visits) - 1, min(sample, len(visits))).astype(int))]
    tokens = max(visit.request.max_num_tokens for visit in chosen)
    options = EngineOptions(
        engine.runner.limits.max_step_tokens,
        max_requests=1,
        kv_tokens=max(PAGE_TOKENS, tokens),
        threads=engine.team.num_threads,
        prefix_cache=False,
    )
    with contextlib.closing(Engine(engine.model, options, eos_ids=engine.eos_ids)) as alone:
        different = [visit.request.id for visit in chosen if not _is_same(visit.request, _answer(alone, visit.request))]
    return different, len(chosen)


def _answer(engine, request, **options):
    made = engine.add(request.prompt_ids, request.params, **options)
    while engine.has_work:
        engine.step()
    return made


def _is_same(one, two) -> bool:
    logprobs = [np.array(request.logprobs, np.float32).tobytes() for request in (one, two)]
    return one.output_ids == two.output_ids and logprobs[0] == logprobs[1]


# ------------------------------------------------------------ figures


def spread(seconds):
    """Mean, percentiles and largest of times in seconds, in milliseconds: {name: number}; {} for no times. A percentile
    is the least of the times that so many percent of the times do not exceed."""
    if not len(seconds):
        return {}
    ms = np.asarray(seconds, np.float64) * 1e3
    percentiles = {f"p{p}": float(np.percentile(ms, p, method="inverted_cdf")) for p in PERCENTILES}
    return dict(mean=float(ms.mean()), **percentiles, max=float(ms.max()))


def summary(measured):
    """The figures of a run, as plain data; rates are per second of the whole run, shares are of the steps' time. Prompt
    tokens that the prefix cache had are counted beside those that were computed, and have no rate."""
    visits, steps, counts = measured.visits, measured.steps, measured.counts
    seconds = steps[-1].ended
    num_cached = sum(v.request.num_cached for v in visits)
    totals = dict(
        requests=len(visits),
        computed_prompt_tokens=sum(len(v.request.prompt_ids) for v in visits) - num_cached,
        cached_prompt_tokens=num_cached,
        output_tokens=sum(len(v.request.output_ids) for v in visits),
    )
    queried = counts.get("query_tokens")
    return dict(
        seconds=seconds,
        totals=totals,
        rates={name: total / seconds for name, total in totals.items() if name != "cached_prompt_tokens"},
        first_token_ms=spread([v.first_token for v in visits]),
        between_tokens_ms=spread([gap for v in visits for gap in v.between_tokens]),
        whole_answer_ms=spread([v.whole_answer for v in visits]),
        held_back_ms=spread([v.arrived - v.due for v in visits if v.arrived > v.due]),
        num_held_back=sum(v.arrived > v.due for v in visits),
        hit_rate=counts["hit_tokens"] / queried if queried else None,
        counts=counts,
        steps=_of_steps(steps, seconds),
    )


def _of_steps(steps, seconds):
    parts = np.array(
        [(s.scheduled - s.started, s.entered - s.scheduled, s.left - s.entered, s.ended - s.left) for s in steps]
    )
    shares = dict(
        zip(("scheduling", "building", "native", "taking"), (parts.sum(0) / parts.sum()).tolist(), strict=True)
    )
    return dict(
        count=len(steps),
        busy=float(parts.sum()) / seconds,
        ms=spread(parts.sum(1)),
        shares=shares,
        host_share=1 - shares["native"],
        mean_requests=float(np.mean([s.num_requests for s in steps])),
        mean_tokens=float(np.mean([s.num_tokens for s in steps])),
        most_waiting=max(s.num_waiting for s in steps),
    )


def plain(workload, measured):
    """The workload, the figures and the visits of a run, as plain data."""
    rows = [
        dict(
            due=v.due,
            arrived=v.arrived,
            prompt_tokens=len(v.request.prompt_ids),
            token_times=v.token_times,
            preemptions=v.request.num_preemptions,
        )
        for v in measured.visits
    ]
    return dict(workload=asdict(workload), **summary(measured), visits=rows)
