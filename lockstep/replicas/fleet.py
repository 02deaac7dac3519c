"""The engines of several replicas behind one StreamEngine.

A stream belongs to one replica at a time. When a replica dies or hangs, its streams go on in others of the same model
from the tokens that are known; what a replica says of a stream that it has no more is passed over. A fresh replica
takes the place of a lost one.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from lockstep.engine.making import RequestMaker
from lockstep.engine.token_stream import EngineStopped, TokenStream, wake
from lockstep.progress import OnProgress
from lockstep.receipts.identity import ModelPart, difference
from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import Verdict, unchecked
from lockstep.receipts.verify import NOTHING, Given
from lockstep.replicas import messages
from lockstep.replicas.carrier import CLOSE_SECONDS, Carrier
from lockstep.replicas.limits import DEFAULTS, FleetLimits
from lockstep.replicas.link import LEAVING, LOST, READY, STARTING, STUCK, Link, Running, running
from lockstep.replicas.messages import Cancel, Close, Ready, Update
from lockstep.replicas.replacements import Replacements
from lockstep.replicas.reports import ReportingEngine
from lockstep.replicas.router import choose, usable_names
from lockstep.replicas.updates import Differing, take
from lockstep.replicas.verifying import ReplicasLost

LOOK_SECONDS = 0.05  # between looks at the replicas
log = logging.getLogger("lockstep.replicas")


class Fleet(ReportingEngine):
    """Runs requests in replicas. Any thread may call its methods.

    maker: makes the front's requests. identity: of the model, returned when it is known: a replica with another one is
    not used. has_states: whether the model's layers have recurrent states. check_share: of all answers, how many are
    verified by another replica when it has nothing to do.
    """

    def __init__(
        self,
        maker: RequestMaker,
        identity: Callable[[], ModelPart],
        carrier: Carrier,
        settings: Mapping[str, Any],
        num_replicas: int,
        *,
        has_states: bool,
        limits: FleetLimits = DEFAULTS,
        check_share: float = 0.0,
    ) -> None:
        super().__init__(maker, check_share)
        self._identity, self._carrier, self._settings = identity, carrier, settings
        self._has_states, self.limits = has_states, limits
        self._changed, self._restarting = threading.Event(), threading.Lock()
        self._open: dict[int, Running] = {}  # streams, by the id of the front's request
        self._replacements = Replacements(num_replicas, limits.max_starts)
        self._is_closing, self._has_started, self._error = False, False, None
        self._progress: OnProgress | None = None
        self._watcher = threading.Thread(target=self._watch, name="lockstep replicas", daemon=True)

    # ------------------------------------------------------------ life

    def start(self, progress: OnProgress | None = None) -> None:
        """Starts all replicas, the first one alone: it compiles and packs what the others then find. ValueError, which
        says why, where one cannot start."""
        self._progress = progress
        self._watcher.start()
        try:
            for numbers in ([0], range(1, len(self._replacements))):
                for number in numbers:
                    self._start(number)
                for number in numbers:
                    self._wait_for(number)
        except BaseException:
            self.close()
            raise
        self._has_started = True

    def _wait_for(self, number: int) -> None:
        link = self.links[number]
        while link.state == STARTING:
            self._changed.wait(LOOK_SECONDS)
            self._changed.clear()
        if link.state != READY:
            raise ValueError(f"replica {number}: {link.reason or f'it did not start: {link.carried.why()}'}")

    def _start(self, number: int) -> None:
        carried = self._carrier.start(number, self._settings)
        with self._lock:
            self.links[number] = Link(number, carried, self._receive, self._ended)

    def close(self) -> None:
        """Ends all replicas; open streams raise EngineStopped."""
        with self._lock:
            self._is_closing = True
            self._fail_all(EngineStopped("the engine is closed"))
            links = list(self.links.values())
        for link in links:
            if link.state in (STUCK, STARTING):  # it would not hear that it is to end, or only later
                link.carried.kill()
            link.send(Close())
        until = time.monotonic() + CLOSE_SECONDS
        for link in links:
            link.carried.wait(max(0.0, until - time.monotonic()))
        self._carrier.close()

    def restart(self) -> None:
        """Ends all replicas and starts fresh ones, one after the other; their streams go on in the others. ValueError
        while that is under way."""
        if not self._restarting.acquire(blocking=False):
            raise ValueError("the replicas are being replaced already")
        try:
            self._replace_all()
        finally:
            self._restarting.release()

    def _replace_all(self) -> None:
        self._replacements.revive()
        self._error = None
        for number in list(self.links):
            self._wait_while_starting()
            with self._lock:
                old = self.links[number]
                if self._is_closing or old.state not in (READY, STUCK):
                    continue
                log.info("%s makes room for a fresh one", old)
                old.state = LEAVING
                self._move(old, is_lost=False)
                old.send(Close())
            while not self._is_closing and self.links[number] is old:
                time.sleep(LOOK_SECONDS)
            self._wait_while_starting()
            if not self._is_closing and self.links[number].state != READY:
                raise ValueError(f"replica {number} did not start again, so the others are left as they are")

    def _wait_while_starting(self) -> None:
        while not self._is_closing and any(link.state == STARTING for link in list(self.links.values())):
            time.sleep(LOOK_SECONDS)

    @property
    def error(self) -> BaseException | None:
        """Why no replica is left, and none will be; None while there is hope."""
        return self._error

    # ------------------------------------------------------------ streams

    def send(self, action: str, *streams: TokenStream) -> None:
        """Has streams "submit"ted or "cancel"led. EngineStopped where no replica is left; ValueError for a logits_mask
        of the caller's own."""
        if action == "cancel":
            self._cancel(streams)
            return
        given = [running(stream) for stream in streams]
        with self._lock:
            if self._is_closing or self._error is not None:
                raise EngineStopped(str(self._error or "the engine is closed")) from self._error
            for each in given:
                self._verifications.checks.begin(each)
            self._route(given)

    def verify(self, statement: Statement, given: Given = NOTHING, cache_salt: str = "") -> "Future[Verdict]":
        """Has a replica verify a receipt's statement; see `Verifier.begin`. The future, or this, raises ReplicasLost
        where no replica can."""
        with self._lock:
            return self._verifications.begin(self._working(), statement, given, cache_salt)

    def _route(self, given: Iterable[Running]) -> None:
        """Gives streams to replicas; those of one prompt to the same. Where there is none, they wait."""
        groups: dict[tuple[int, ...], list[Running]] = {}
        for each in given:
            groups.setdefault(tuple(each.request.prompt_ids), []).append(each)
        for group in groups.values():
            self._open.update((each.request.id, each) for each in group)
            links = self._working()
            if not links:
                for each in group:
                    each.waits_since = time.monotonic()
                self._waiting += group
                continue
            names = usable_names(group[0].request)
            link = choose(links, names, self._has_states)
            link.give(group, link.blocks.num_known(names, self._has_states))

    def _cancel(self, streams: Iterable[TokenStream]) -> None:
        ended = []
        with self._lock:
            for stream in streams:
                each = self._open.pop(stream.request.id, None)
                if each is None:
                    continue
                if each.home is None:
                    self._waiting.remove(each)
                else:
                    each.home.send(Cancel([each.number]))
                    each.home.drop(each.number)
                stream.request.finish_reason = "cancelled"
                ended.append(stream.advance())
        wake(ended)

    def _drop(self, link: Link, number: int) -> Running | None:
        """Takes a stream from its replica, which has it no more."""
        found = link.drop(number)
        if found is not None:
            del self._open[found.request.id]
        return found

    # ------------------------------------------------------------ what replicas say

    def _receive(self, link: Link, message: Any) -> None:
        with self._lock:
            if link.state == LOST:
                return
            match message:
                case messages.Step(updates, names):
                    link.blocks.take(names)
                    self._take(link, updates)
                case messages.Stage(name, numbers):
                    for each in filter(None, map(link.streams.get, numbers)):
                        each.stages.add(name)
                case messages.Beat():
                    link.take_beat(message)
                    if link.state == STUCK:
                        log.warning("%s is heard again", link)
                        self._work(link)
                case messages.Loading(kind, done, total):
                    if self._progress is not None and not self._has_started:
                        self._progress(kind, done, total)
                case messages.Ready():
                    self._begin(link, message)
                case messages.Failed(reason):
                    link.reason = reason
                case messages.Refusal(number, reason):
                    self._refuse(link, number, reason)
                case messages.Verified(number, verdict):
                    self._judged(link, number, verdict)

    def _begin(self, link: Link, ready: Ready) -> None:
        link.ready, wrong = ready, difference(ready.numerics, ready.identity, self._identity())
        if wrong is not None:
            link.reason = f"it must not answer beside the others: {wrong[3]}"
            link.carried.kill()
            return
        self._replacements.started(link.number)
        if self._has_started:
            log.info("%s is ready", link)
        self._work(link)

    def _work(self, link: Link) -> None:
        link.state = READY
        waiting, self._waiting = self._waiting, []
        self._route(waiting)
        self._changed.set()

    def _take(self, link: Link, updates: list[Update]) -> None:
        woken = []
        for update in updates:
            each = link.streams.get(update.number)
            if each is None:  # it was cancelled, or goes on elsewhere
                continue
            try:
                take(each.request, update, self.maker, each.num_moves)
            except Differing as error:
                self._drop(link, each.number)
                self._take_out(link, str(error))
                woken.append(
                    each.stream.fail(ReplicasLost(f"{link} was taken out, since it computes wrongly: {error}"))
                )
                break
            if update.output_ids:
                link.computed(each.number)
            if each.request.finish_reason is not None:
                self._drop(link, each.number)
                self._verifications.checks.add(each, link, self._identity())
            woken.append(each.stream.advance())
        wake(woken)

    def _take_out(self, link: Link, reason: str) -> None:
        """Ends a replica that computes wrongly; nothing that it says is read any more."""
        log.error("%s is taken out: %s", link, reason)
        link.state, link.reason = LOST, reason
        link.carried.kill()

    def _refuse(self, link: Link, number: int, reason: str) -> None:
        if number < 0:
            self._judged(link, number, unchecked("replica", reason))
            return
        each = self._drop(link, number)
        if each is not None:
            wake([each.stream.fail(ReplicasLost(f"{link} refused the request: {reason}"))])

    def _judged(self, link: Link, number: int, verdict: Verdict) -> None:
        wrong = self._verifications.take(link, number, verdict, self._working())
        if wrong is not None and wrong.state != LOST:
            self._take_out(wrong, "another replica, which verified its answer, found another one")

    # ------------------------------------------------------------ replicas that are lost

    def _ended(self, link: Link) -> None:
        """A replica's connection has ended."""
        with self._lock:
            was, link.state = link.state, LOST
            self._changed.set()
            if self._is_closing:
                return
            self.num_lost += was != LEAVING
            self._lost.add(link)
            self._move(link, was != LEAVING)
            self._verifications.move(link, self._working())
        why = link.reason or link.carried.why()
        if was != LEAVING and (self._has_started or was != STARTING):  # `start` itself says why the first did not start
            log.warning("%s was lost: %s", link, why)
        with self._lock:
            self._replace(link.number, was == STARTING, why)

    def _move(self, link: Link, is_lost: bool) -> None:
        """Hands a replica's streams to others. is_lost: whether this counts for max_moves."""
        moved = [each for number in list(link.streams) if (each := self._drop(link, number)) is not None]
        for each in moved:
            each.num_moves += is_lost
            each.num_lost += is_lost and each.is_at_work
        self.num_moved += len(moved)
        if moved:
            log.warning("%d streams of %s go on elsewhere", len(moved), link)
        most = self.limits.max_moves
        for each in moved:
            if each.num_lost > most:
                text = f"the request was given up: {each.num_lost} replicas were lost while they ran it"
                wake([each.stream.fail(ReplicasLost(text))])
        self._route([each for each in moved if each.num_lost <= most])

    def _replace(self, number: int, has_failed: bool, why: str) -> None:
        if self._replacements.plan(number, has_failed):
            return
        log.error("replica %d is given up, as it did not start %d times: %s", number, self.limits.max_starts, why)
        if self._replacements.are_all_given_up:
            self._error = ReplicasLost(f"no replica is left: {why}")
            self._fail_all(self._error)

    def _fail_all(self, error: BaseException) -> None:
        left = [*self._waiting]
        for link in self.links.values():
            left += [each for number in list(link.streams) if (each := self._drop(link, number)) is not None]
        self._waiting = []
        self._open.clear()
        wake([each.stream.fail(error) for each in left])

    def _watch(self) -> None:
        """Looks after the replicas until `close`."""
        while not self._is_closing:
            time.sleep(LOOK_SECONDS)
            try:
                self._look()
            except Exception:
                log.exception("a look at the replicas failed")

    def _look(self) -> None:
        now = time.monotonic()
        with self._lock:
            for link in list(self.links.values()):
                silent = now - link.heard
                if link.state == READY and silent > self.limits.silent_seconds:
                    self._stick(link, silent)
                elif link.state in (STUCK, LEAVING) and silent > self.limits.kill_seconds:
                    link.carried.kill()
                elif link.state == STARTING and silent > self.limits.start_seconds:
                    link.reason = f"it said nothing for {silent:.0f} s while it started"
                    link.carried.kill()
            late = [each for each in self._waiting if now - each.waits_since > self.limits.wait_seconds]
            for each in late:
                self._waiting.remove(each)
                del self._open[each.request.id]
            self._verifications.check_one(self._working())
            due = self._replacements.take_due()
        text = f"no replica was ready for {self.limits.wait_seconds:g} s"
        wake([each.stream.fail(ReplicasLost(text)) for each in late])
        for number in due:  # a carrier may take its time
            threading.Thread(target=self._restart, args=[number], name="lockstep replica", daemon=True).start()

    def _stick(self, link: Link, silent: float) -> None:
        """A replica gives no sign of life: its streams go on elsewhere, and it gets no new ones until it is heard."""
        log.warning("%s has been silent for %.1f s", link, silent)
        link.state = STUCK
        link.send(Cancel(list(link.streams)))
        self._move(link, is_lost=True)
        self._verifications.move(link, self._working())

    def _restart(self, number: int) -> None:
        if self._is_closing:
            return
        try:
            self._start(number)
        except (OSError, ValueError) as error:
            with self._lock:
                self._replace(number, has_failed=True, why=str(error))
