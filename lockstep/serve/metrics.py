"""Counters and histograms of the server, kept on the event loop and shown in Prometheus' text form."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from lockstep.engine.async_engine import ReplicaReport, StreamEngine
from lockstep.engine.speculation.drafts import DraftCounts

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
WHOLE_ANSWER = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAUGES = {
    "running": "Sequences that the engine runs",
    "waiting": "Sequences that wait for the engine",
    "pages": "Pages of KV cache",
    "pages_free": "Pages that hold nothing",
    "pages_idle": "Pages that are only kept for later prompts",
}
COUNTERS = {
    "preempted": ("preemptions", "Sequences that had to give their memory back and start again"),
    "query_tokens": ("prefix_query_tokens", "Prompt tokens looked for in the prefix cache"),
    "not_finite": ("not_finite", "Sequences that failed as the model gave no finite numbers"),
    "hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    "pages_evicted": ("pages_evicted", "Kept pages that were needed for others"),
}
REPLICA_GAUGES: tuple[tuple[str, str, Callable[[ReplicaReport], int]], ...] = (
    ("up", "Whether a replica runs requests", lambda report: int(report.is_ready)),
    ("running", "Sequences that a replica was given", lambda report: report.num_streams),
    (
        "load",
        "Tokens of prompts that a replica has to compute, and 64 for each sequence",
        lambda report: report.load,
    ),
)
REPLICA_EVENTS = {
    "lost": ("replicas_lost", "Replicas that died, hung or were taken out"),
    "moved": ("sequences_moved", "Sequences that went on in another replica"),
    "checked": ("answers_checked", "Answers that another replica verified"),
    "wrong": ("answers_wrong", "Of these, the ones that it found false"),
}


class Histogram:
    """Counts of values up to each bound. For one thread only: prometheus_client's class takes a lock for each value."""

    def __init__(self, bounds) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value, count: int = 1) -> None:
        """Adds a value, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name, text):
        """The histogram as a metric family of prometheus_client."""
        cumulative, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            cumulative += count
            buckets.append((bound, cumulative))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """Counters and histograms of a server. Only its event loop may change them.

    cached_tokens: of the prompts' tokens, those that the prefix cache had; only the log shows it. refused: {reason:
    requests} that were refused because of the server's state or load. answered: {status: requests}.
    """

    def __init__(self, service) -> None:
        self._service = service
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.cancelled = 0
        self.refused, self.answered = Counter(), Counter()
        self.first_token, self.between_tokens = Histogram(FIRST_TOKEN), Histogram(BETWEEN_TOKENS)
        self.whole_answer = Histogram(WHOLE_ANSWER)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self):
        """All metrics in Prometheus' text form, as bytes."""
        return generate_latest(self._registry)

    def collect(self):
        """Yields all metric families; prometheus_client calls it."""
        yield _counter("prompt_tokens", "Prompt tokens of requests that began to be answered", self.prompt_tokens)
        yield _counter("generated_tokens", "Tokens generated", self.generated_tokens)
        yield _counter("cancelled_requests", "Requests whose client left", self.cancelled)
        yield _labelled("refused_requests", "Requests refused, by reason", "reason", self.refused)
        yield _labelled("responses", "Responses, by HTTP status", "status", self.answered)
        yield self.first_token.family("lockstep_time_to_first_token_seconds", "From the request to its first token")
        yield self.between_tokens.family("lockstep_inter_token_seconds", "From one token of a sequence to the next")
        yield self.whole_answer.family("lockstep_request_seconds", "From the request to the end of its answer")
        yield GaugeMetricFamily("lockstep_open_requests", "Requests being answered", self._service.num_open)
        yield GaugeMetricFamily(
            "lockstep_queued_tokens",
            "Prompt tokens of sequences without a token of an answer",
            self._service.num_queued_tokens,
        )
        counts = self._service.counts()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"lockstep_{name}", text, counts.get(name, 0))
        for name, (shown, text) in COUNTERS.items():
            yield _counter(shown, text, counts.get(name, 0))
        yield from _drafts(self._service.draft_counts())
        if self._service.engine is not None:
            yield from _replicas(self._service.engine)


def _replicas(engine: StreamEngine) -> Iterator[Metric]:
    """What is known of each of several engines, and what happened to them; nothing where there is one."""
    reports = engine.replica_reports()
    if not reports:
        return
    for name, text, of in REPLICA_GAUGES:
        family = GaugeMetricFamily(f"lockstep_replica_{name}", text, labels=["replica"])
        for report in reports:
            family.add_metric([str(report.number)], of(report))
        yield family
    for name, (shown, text) in COUNTERS.items():
        family = CounterMetricFamily(f"lockstep_replica_{shown}", text, labels=["replica"])
        for report in reports:
            family.add_metric([str(report.number)], report.counts.get(name, 0))
        yield family
    for name, count in engine.event_counts().items():
        yield _counter(*REPLICA_EVENTS[name], count)


def _drafts(counts: Mapping[str, DraftCounts]) -> Iterator[CounterMetricFamily]:
    """How many draft tokens were computed and how many were right, by source and depth: the first draft token after
    a sampled one has depth 1."""
    labels = ["source", "depth"]
    drafted = CounterMetricFamily("lockstep_drafts", "Tokens guessed ahead and computed", labels=labels)
    right = CounterMetricFamily("lockstep_accepted_drafts", "Of these, the ones that were right", labels=labels)
    for source, source_counts in sorted(counts.items()):
        for depth, count in enumerate(source_counts.drafted):
            if count:
                drafted.add_metric([source, str(depth + 1)], count)
                right.add_metric([source, str(depth + 1)], source_counts.right[depth])
    yield from (drafted, right)


def _counter(name, text, value):
    return CounterMetricFamily(f"lockstep_{name}", text, value)


def _labelled(name, text, label, values):
    family = CounterMetricFamily(f"lockstep_{name}", text, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([str(value)], count)
    return family
