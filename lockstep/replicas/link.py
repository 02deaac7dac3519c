"""The front's side of one replica: its connection, what is known of it, and the streams that it runs."""

import itertools
import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lockstep.engine.request import Request
from lockstep.engine.speculation.drafts import DraftCounts
from lockstep.engine.token_stream import TokenStream
from lockstep.receipts.form import form_of
from lockstep.replicas.carrier import Carried
from lockstep.replicas.messages import BEGUN, READ, WAITS, Asked, Beat, Ready, Submit
from lockstep.replicas.router import OPEN_TOKENS, KnownBlocks, usable_names
from lockstep.replicas.updates import known_answer

MOVED_PRIORITY = 1 << 40  # requests that were moved go ahead of all others
STARTING, READY, STUCK, LEAVING, LOST = "starting", "ready", "stuck", "leaving", "lost"
NUMBERS = itertools.count(1)
log = logging.getLogger("lockstep.replicas")


@dataclass(eq=False)
class Running:
    """A stream that a replica runs, or that waits for one.

    form: of its logits_mask. home: the replica that has it; number: by which both sides know it there, another one each
    time that it is given away: what an earlier replica, or the same one before, still says of it is nobody's.
    stages: see `messages.Stage`, of its home. num_moves: how many replicas were lost with it; num_lost: of these, those
    that may have been lost because of it. waits_since: time.monotonic(), while it waits. is_checked: whether
    another replica is to verify it; drops_leaves: whether its leaves are only for that.
    """

    stream: TokenStream
    form: dict[str, Any] | None
    prediction: list[int]
    home: "Link | None" = None
    number: int = 0
    stages: set[str] = field(default_factory=set)
    num_moves: int = 0
    num_lost: int = 0
    waits_since: float = 0.0
    is_checked: bool = False
    drops_leaves: bool = False

    @property
    def request(self) -> Request:
        """The front's request, which has all that is known of the answer."""
        return self.stream.request

    @property
    def is_at_work(self) -> bool:
        """Whether its replica may end because of it."""
        return BEGUN in self.stages or (READ in self.stages and WAITS not in self.stages)

    def asked(self) -> Asked:
        """What a replica needs to go on with it."""
        request = self.request
        has_begun = request.admitted is not None
        priority = request.priority - (MOVED_PRIORITY if self.num_moves or has_begun else 0)
        params = replace(request.params, logits_mask=None)
        return Asked(
            number=self.number,
            prompt_ids=array("i", request.prompt_ids),
            params=params,
            form=self.form,
            known=known_answer(request),
            prediction=array("i", self.prediction),
            priority=priority,
            cache_salt=request.cache_salt,
            is_moved=has_begun,
        )


def running(stream: TokenStream) -> Running:
    """A new stream. ValueError for a logits_mask that another process cannot make."""
    request = stream.request
    try:
        form = form_of(request.params.logits_mask)
    except ValueError:
        raise ValueError("logits_mask: expected a form that a replica can make, too, got a function") from None
    prediction = [] if request.prediction is None else request.prediction.tokens
    return Running(stream, form, list(prediction))


class Link:
    """One replica, from its start to its end. All but `send` are for whoever holds the fleet's lock.

    number: its place in the fleet, which its successors have, too. receive: called in a thread of the link's own with
    each message; ended: called in it, last.
    """

    def __init__(
        self, number: int, carried: Carried, receive: Callable[["Link", Any], None], ended: Callable[["Link"], None]
    ) -> None:
        self.number, self.carried, self.state = number, carried, STARTING
        self.ready: Ready | None = None
        self.reason: str | None = None  # why it cannot run, in its own words
        self.streams: dict[int, Running] = {}
        self.verifying: set[int] = set()
        self.blocks = KnownBlocks()
        self.counts: dict[str, int] = {}
        self.draft_counts: dict[str, DraftCounts] = {}
        self.began = self.heard = time.monotonic()
        self.seconds_in_step = 0.0
        self.load = 0  # see router.Place
        self._loads: dict[int, int] = {}  # of each stream
        self._receive, self._on_end = receive, ended
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for run in (self._write, self._read):
            threading.Thread(target=run, name=f"lockstep replica {number}", daemon=True).start()

    def __repr__(self) -> str:
        """Its number and where it runs."""
        return f"replica {self.number} ({self.carried.place})"

    def send(self, message: Any) -> None:
        """Queues a message: a replica that does not read delays nobody."""
        self._outbox.put(message)

    def give(self, given: list[Running], num_known: int) -> None:
        """Has the replica run streams. num_known: tokens of their prompt that it need not compute."""
        for each in given:
            each.home, each.number, each.stages = self, next(NUMBERS), set()
            self.streams[each.number] = each
            load = OPEN_TOKENS + max(0, each.request.num_tokens - num_known)
            self._loads[each.number] = load
            self.load += load
            self.blocks.expect(usable_names(each.request))
        self.send(Submit([each.asked() for each in given]))

    def computed(self, number: int) -> None:
        """The prompt of a stream is computed."""
        self.load += OPEN_TOKENS - self._loads[number]
        self._loads[number] = OPEN_TOKENS

    def drop(self, number: int) -> Running | None:
        """Takes a stream away, if the replica has it."""
        found = self.streams.pop(number, None)
        if found is not None:
            found.home = None
            self.load -= self._loads.pop(number)
            self.blocks.stop_expecting(usable_names(found.request))
        return found

    def take_beat(self, beat: Beat) -> None:
        """Notes what a replica says of itself."""
        self.seconds_in_step, self.counts, self.draft_counts = beat.seconds_in_step, beat.counts, beat.draft_counts
        self.blocks.take(beat.names)

    # ------------------------------------------------------------ its threads

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self.carried.connection.send(message)
            except (OSError, ValueError):  # the replica has ended: the thread that reads sees it, too
                return

    def _read(self) -> None:
        try:
            while True:
                message = self.carried.connection.recv()
                self.heard = time.monotonic()
                self._receive(self, message)
        except (EOFError, OSError):
            pass
        except Exception:  # whatever it says that cannot be read: its streams go on elsewhere
            log.exception("%s is not understood", self)
        self._outbox.put(None)
        self._on_end(self)
