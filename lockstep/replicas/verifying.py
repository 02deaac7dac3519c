"""Receipts that replicas verify: for clients, and of one another's answers."""

import itertools
from concurrent.futures import Future
from dataclasses import dataclass

from lockstep.receipts.form import form_of
from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import Verdict
from lockstep.receipts.verify import NOTHING, Given
from lockstep.replicas.checks import Check, Checks
from lockstep.replicas.link import Link
from lockstep.replicas.messages import Verify

MAX_MOVES = 2  # how many lost replicas a verification survives


class ReplicasLost(RuntimeError):
    """A request cannot be answered, since the replicas that ran it were lost. The message is one sentence."""


@dataclass(eq=False)
class Asked:
    """A verification that a replica does. future: of its Verdict, for who waits for it; check: of another replica's
    answer."""

    message: Verify
    future: Future[Verdict] | None
    check: Check | None
    num_moves: int = 0


class Verifications:
    """What replicas verify. All methods are for whoever holds the fleet's lock. share: see Checks."""

    def __init__(self, share: float) -> None:
        self.checks = Checks(share)
        self._asked: dict[int, Asked] = {}
        self._numbers = itertools.count(-1, -1)  # requests have the others

    def begin(self, links: list[Link], statement: Statement, given: Given, cache_salt: str) -> "Future[Verdict]":
        """Has the replica with the least to do verify a statement. ReplicasLost where there is none."""
        form = form_of(given.logits_mask)
        message = Verify(next(self._numbers), statement, given._replace(logits_mask=None), form, cache_salt)
        future: Future[Verdict] = Future()
        self._ask(_least_busy(links), Asked(message, future, None))
        return future

    def check_one(self, links: list[Link]) -> None:
        """Has an idle replica, if there is one, verify an answer of another."""
        found = self.checks.next(links)
        if found is not None:
            check, judge = found
            message = Verify(next(self._numbers), check.statement, NOTHING, None, "")
            self._ask(judge, Asked(message, None, check))

    def _ask(self, link: Link, asked: Asked) -> None:
        self._asked[asked.message.number] = asked
        link.verifying.add(asked.message.number)
        link.send(asked.message)

    def take(self, link: Link, number: int, verdict: Verdict, links: list[Link]) -> Link | None:
        """Takes in a verdict; returns a replica that computes wrongly, if that is now known."""
        asked = self._asked.pop(number, None)
        link.verifying.discard(number)
        if asked is None:
            return None
        if asked.future is not None:
            asked.future.set_result(verdict)
        return None if asked.check is None else self.checks.judged(asked.check, link, verdict, links)

    def move(self, link: Link, links: list[Link]) -> None:
        """A replica has ended: others verify what it was verifying for clients."""
        for asked in [self._asked.pop(number) for number in link.verifying]:
            asked.num_moves += 1
            if asked.future is None:
                continue
            if asked.num_moves > MAX_MOVES or not links:
                asked.future.set_exception(ReplicasLost("the replicas that verified the receipt were lost"))
            else:
                self._ask(_least_busy(links), asked)
        link.verifying.clear()


def _least_busy(links: list[Link]) -> Link:
    if not links:
        raise ReplicasLost("no replica is ready to verify the receipt")
    return min(links, key=lambda link: (link.load, len(link.verifying), link.number))
