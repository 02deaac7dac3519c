"""Requests that arrive over time, driven through an engine in one thread, and what they met: latencies, throughput.

Between two steps the driver hands over whatever has become due, so an arrival waits for the engine's step as it would
behind a server, and no other thread takes the interpreter from the engine. Times count from the arrival, not from the
moment of handing over. Times are seconds; those of a run count from its beginning.
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

LOWEST_RATE = 1e-3  # arrivals a second: a wait has to end
PERCENTILES = (50, 95, 99)
LIMITS = {  # of a workload's numbers: kind, least, largest
    "requests": (int, 1, 1_000_000),
    "rate": ((int, float), 0, 1e6),
    "burst": (int, 1, 1_000_000),
    "shared_prefix": (int, 0, 1 << 24),
    "seed": (int, 0, (1 << 63) - 1),
}


@dataclass(frozen=True)
class Workload:
    """What arrives, and when. The same values always make the same requests. ValueError if a value is not allowed.

    requests: how many. rate: arrivals per second on average, at random moments (Poisson); 0: all at once. burst:
    arrivals come in groups of so many, and groups at random moments. prompt, output: least and most tokens, each
    number between them as likely. shared_prefix: tokens in front of every prompt, the same for all. temperature: as in
    SamplingParams; each request draws with a seed of its own. Answers are as long as drawn, whatever they say.
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
        """When each request arrives, ascending; the first at 0."""
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
    """One request: when it was due, when it arrived (later, where it had to wait for a place among the concurrent), and
    when each token of its answer was there."""

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
    """One step of the engine: requests and tokens in it, requests that were admitted, that still are after it, and that
    waited, and the moments at which its parts ended. Between `scheduled` and `entered` the batch is built, between
    `left` and `ended` tokens are taken."""

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
    """A context in which every step of an engine is timed, part by part: a list of Step in `steps`."""

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
    """Hands requests to an engine at their times until all are answered.

    visits: in order of due time. concurrency: how many may be under way; one that is due while there are so many
    arrives when a place is free, as from a client that holds it back. None: any number. clock, sleep: of the `time`
    module.
    """

    def __init__(self, engine, visits, concurrency=None, clock=time.perf_counter, sleep=time.sleep) -> None:
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        self.engine, self._left, self._sleep = engine, deque(visits), sleep
        self._visit_of = {visit.request.id: visit for visit in visits}
        # places of clients, by the moment at which they became free
        self._places = [0.0] * (concurrency or len(visits))
        started = clock()
        self._now = lambda: clock() - started

    def run(self):
        """Runs to the end; returns the steps."""
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
        while self._left and self._places and self._left[0].due <= now:
            visit = self._left.popleft()
            visit.arrived = max(visit.due, heapq.heappop(self._places))
            self.engine.scheduler.add(visit.request)

    def _note(self, changed, now) -> None:
        for request in changed:
            assert request.error is None, request.error
            visit = self._visit_of[request.id]
            visit.token_times += [now] * (len(request.output_ids) - len(visit.token_times))
            if request.finish_reason is not None:
                heapq.heappush(self._places, now)


@dataclass(frozen=True)
class Measured:
    """A run: its visits and steps, and what the engine counted meanwhile."""

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
    """Runs what `prepare` made on an idle engine; returns a Measured."""
    _answer(engine, visits[0].request, cache_salt="warm-up")  # under a salt of its own: nobody finds its prefix
    before = engine.counts()
    steps = Driver(engine, visits, concurrency).run()
    after = engine.counts()
    return Measured(visits, steps, {name: after[name] - before.get(name, 0) for name in COUNTED if name in after})


# what an engine counts up, where it has what is counted
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
    """Runs a sample of answered requests once more, each alone, in a new engine that holds one request and has no
    prefix cache; returns (ids of those whose tokens or log-probabilities differ in a bit, how many were run)."""
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


def _is_same(a, b) -> bool:
    logprobs = [np.array(r.logprobs, np.float32).tobytes() for r in (a, b)]
    return a.output_ids == b.output_ids and logprobs[0] == logprobs[1]


# ------------------------------------------------------------ figures


def spread(seconds):
    """Mean, percentiles (the least that so many percent do not exceed) and largest of some seconds, in milliseconds:
    {name: number}; {} for none."""
    if not len(seconds):
        return {}
    ms = np.asarray(seconds, np.float64) * 1e3
    percentiles = {f"p{p}": float(np.percentile(ms, p, method="inverted_cdf")) for p in PERCENTILES}
    return dict(mean=float(ms.mean()), **percentiles, max=float(ms.max()))


def summary(measured):
    """A run in figures, as plain data; rates are per second of the whole run, shares are of the steps' time."""
    visits, steps, counts = measured.visits, measured.steps, measured.counts
    seconds = steps[-1].ended
    totals = dict(
        requests=len(visits),
        prompt_tokens=sum(len(v.request.prompt_ids) for v in visits),
        output_tokens=sum(len(v.request.output_ids) for v in visits),
    )
    queried = counts.get("query_tokens")
    return dict(
        seconds=seconds,
        totals=totals,
        rates={name: total / seconds for name, total in totals.items()},
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
    """All that is known of a run but its steps, as plain data."""
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
