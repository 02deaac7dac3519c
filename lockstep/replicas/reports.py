"""What a fleet says of itself: counts of all its replicas together, and of each."""

import threading
import time
from collections import Counter
from collections.abc import Iterable

from lockstep.engine.async_engine import ReplicaReport, StreamEngine
from lockstep.engine.making import RequestMaker
from lockstep.engine.speculation.drafts import DraftCounts
from lockstep.replicas.link import LOST, READY, Link, Running
from lockstep.replicas.verifying import Verifications

NOW = ("running", "waiting", "pages", "pages_free", "pages_idle", "states")  # counts that are no sums of events


class LostCounts:
    """Counts of events in replicas that have ended, by their number: totals do not fall when a replica does."""

    def __init__(self) -> None:
        self._events: dict[int, Counter[str]] = {}
        self.drafts: dict[str, DraftCounts] = {}

    def add(self, link: Link) -> None:
        """A replica has ended."""
        events = {name: count for name, count in link.counts.items() if name not in NOW}
        self._events.setdefault(link.number, Counter()).update(events)
        _add_drafts(self.drafts, link)

    def of(self, link: Link) -> dict[str, int]:
        """The counts of a replica, its predecessors' events included."""
        own = link.counts if link.state != LOST else {}
        made = Counter(self._events.get(link.number, {}))
        made.update(own)
        return dict(made)


def summed(links: Iterable[Link], lost: LostCounts) -> dict[str, int]:
    """The counts of all replicas together."""
    sums: Counter[str] = Counter()
    for link in links:
        sums.update(lost.of(link))
    return dict(sums)


def summed_drafts(links: Iterable[Link], lost: LostCounts) -> dict[str, DraftCounts]:
    """The counts of drafts of all replicas, by source, those that have ended included."""
    sums = {source: _copied(counts) for source, counts in lost.drafts.items()}
    for link in links:
        if link.state != LOST:
            _add_drafts(sums, link)
    return sums


def _add_drafts(sums: dict[str, DraftCounts], link: Link) -> None:
    for source, counts in link.draft_counts.items():
        into = sums.setdefault(source, DraftCounts())
        into.drafted = [a + b for a, b in zip(into.drafted, counts.drafted, strict=True)]
        into.right = [a + b for a, b in zip(into.right, counts.right, strict=True)]


def _copied(counts: DraftCounts) -> DraftCounts:
    made = DraftCounts()
    made.drafted, made.right = list(counts.drafted), list(counts.right)
    return made


def reports(links: Iterable[Link], lost: LostCounts) -> list[ReplicaReport]:
    """What is to be known of each replica."""
    return [
        ReplicaReport(link.number, link.state == READY, len(link.streams), link.load, lost.of(link)) for link in links
    ]


class ReportingEngine(StreamEngine):
    """What a fleet has, and what it tells of that. links: its replicas. num_lost: how many were lost so far; num_moved:
    streams that went on in another one. check_share: see Checks."""

    def __init__(self, maker: RequestMaker, check_share: float) -> None:
        super().__init__(maker)
        self._lock = threading.RLock()
        self.links: dict[int, Link] = {}
        self._waiting: list[Running] = []  # for a replica
        self._verifications, self._lost = Verifications(check_share), LostCounts()
        self.num_moved = self.num_lost = 0

    @property
    def seconds_in_step(self) -> float:
        """Seconds of the running step of the replica that is quickest; where none works, since that one was heard."""
        now = time.monotonic()
        with self._lock:
            links = [link for link in self.links.values() if link.state != LOST]
            return min((link.seconds_in_step if link.state == READY else now - link.heard for link in links), default=0)

    @property
    def is_ready(self) -> bool:
        """Whether a replica runs requests."""
        with self._lock:
            return bool(self._working())

    def counts(self) -> dict[str, int]:
        """The sums of the replicas' counts, see Engine. Streams without a replica wait."""
        with self._lock:
            sums = summed(self.links.values(), self._lost)
            return sums | dict(waiting=sums.get("waiting", 0) + len(self._waiting))

    def draft_counts(self) -> dict[str, DraftCounts]:
        """The sums of the replicas' counts of drafts, by source."""
        with self._lock:
            return summed_drafts(self.links.values(), self._lost)

    def replica_reports(self) -> list[ReplicaReport]:
        """What is to be known of each replica."""
        with self._lock:
            return reports(self.links.values(), self._lost)

    def event_counts(self) -> dict[str, int]:
        """Replicas that were lost, streams that were moved, answers that were verified, and those that were false."""
        checks = self._verifications.checks
        return dict(lost=self.num_lost, moved=self.num_moved, checked=checks.num_checked, wrong=checks.num_wrong)

    def _working(self) -> list[Link]:
        return [link for link in self.links.values() if link.state == READY]
