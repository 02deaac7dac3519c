"""Replicas verify one another's answers: a part of them, when a replica has nothing to do.

Two replicas that differ in one bit of one answer are not told apart by that: a third one decides, and where there is
none, the one that answered is taken out. Either way the answer is named in the log.
"""

import logging
import random
from collections import deque
from dataclasses import dataclass, field

from lockstep.engine.leaves import Leaves
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.identity import ModelPart
from lockstep.receipts.receipt import ReceiptOptions, make_statement
from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import Verdict
from lockstep.replicas.link import READY, Link, Running

MAX_WAITING = 256  # answers that wait to be verified; of more the oldest are dropped
log = logging.getLogger("lockstep.replicas")


@dataclass(eq=False)
class Check:
    """An answer to verify. maker: the replica that ended it; doubter: one that found it false."""

    statement: Statement
    maker: Link
    doubter: Link | None = None
    found: Verdict | None = None


@dataclass
class Checks:
    """share: of all answers, how many are verified. num_checked, num_wrong: how many were, and were false."""

    share: float
    num_checked: int = 0
    num_wrong: int = 0
    _waiting: deque[Check] = field(default_factory=lambda: deque(maxlen=MAX_WAITING))
    _random: random.Random = field(default_factory=random.Random)

    def begin(self, each: Running) -> None:
        """Has the leaves of a new answer kept, if it is to be verified."""
        request = each.request
        is_anew = request.params.pooling is None and not request.output_ids
        if is_anew and self._random.random() < self.share:
            each.is_checked = True
            if request.leaves is None:
                request.leaves, each.drops_leaves = Leaves(), True

    def add(self, each: Running, maker: Link, model: ModelPart) -> None:
        """An answer has ended."""
        request = each.request
        if each.is_checked and request.finish_reason in ("stop", "length"):
            try:
                statement = make_statement(model, request, request.params, 0, ReceiptOptions())
            except ReceiptError:  # of parameters that a receipt does not hold
                return
            self._waiting.append(Check(statement, maker))
        if each.drops_leaves:
            request.leaves = None

    def next(self, links: list[Link]) -> tuple[Check, Link] | None:
        """An answer and an idle replica that can verify it; None where there are not both."""
        idle = [link for link in links if link.state == READY and not link.streams and not link.verifying]
        for check in list(self._waiting):
            judge = next((link for link in idle if link not in (check.maker, check.doubter)), None)
            if judge is not None:
                self._waiting.remove(check)
                return check, judge
        return None

    def judged(self, check: Check, judge: Link, verdict: Verdict, links: list[Link]) -> Link | None:
        """Takes in a verdict; returns the replica that is to be taken out, or None."""
        if verdict.is_true or verdict.code != 1:
            self.num_checked += verdict.is_true
            return check.doubter if verdict.is_true else None
        self.num_checked += 1
        log.error("%s says that an answer of %s is false: %s", judge, check.maker, verdict)
        if check.doubter is None:
            self.num_wrong += 1
            check.doubter = judge
            if any(link.state == READY and link not in (check.maker, judge) for link in links):
                self._waiting.appendleft(check)
                return None
        return check.maker
