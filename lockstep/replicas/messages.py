"""What a front and its replicas tell each other, over a connection that pickles: both are one program of one version,
started by the same user."""

from array import array
from typing import Any, NamedTuple

from lockstep.engine.making import KnownAnswer
from lockstep.engine.request import SamplingParams
from lockstep.engine.speculation.drafts import DraftCounts
from lockstep.receipts.identity import ModelPart
from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import Verdict
from lockstep.receipts.verify import Given

# ------------------------------------------------------------ to a replica


class Asked(NamedTuple):
    """A request of one sample. number: by which both sides know it, see `link.Running`. params: without a logits_mask,
    which `form` makes again (`receipts.form`). known: what is known of its answer. is_moved: whether another replica
    began it."""

    number: int
    prompt_ids: array
    params: SamplingParams
    form: dict[str, Any] | None
    known: KnownAnswer
    prediction: array
    priority: int
    cache_salt: str
    is_moved: bool


class Submit(NamedTuple):
    """Requests to run, in order."""

    asked: list[Asked]


class Cancel(NamedTuple):
    """Requests whose answers nobody reads any more."""

    numbers: list[int]


class Verify(NamedTuple):
    """A receipt's statement to verify, with a number by which the Verified is known."""

    number: int
    statement: Statement
    given: Given
    form: dict[str, Any] | None  # of given's logits_mask, which is left out
    cache_salt: str


class Close(NamedTuple):
    """The end: prefixes that are to be kept on disk are written first."""


# ------------------------------------------------------------ to the front

READ, WAITS, BEGUN = "read", "waits", "begun"  # see Stage


class Loading(NamedTuple):
    """Progress of the start, see `progress.OnProgress`."""

    kind: str
    done: int
    total: int | None


class Ready(NamedTuple):
    """A replica can run requests. identity, numerics: which model it has, in which arithmetic; pid: its process."""

    identity: ModelPart
    numerics: int
    pid: int


class Failed(NamedTuple):
    """A replica cannot start, or its engine stopped. reason: one sentence."""

    reason: str


class Ending(NamedTuple):
    """How a request ended: fields of Request. refused: the message of its Refused and that of its cause, a ValueError,
    if it had one; is_nothing_allowed: whether it is a NothingAllowed. pool: its Reader, for an embedding."""

    finish_reason: str
    stop_reason: int | str | None
    error: str | None
    is_fault: bool
    refused: tuple[str, str | None] | None
    is_nothing_allowed: bool
    pool: Any


class Stage(NamedTuple):
    """How far a replica is with requests, as it tells before it goes on: it READ them, and has yet to make their masks
    and so on; they WAIT in its engine; their computing has BEGUN. One that a replica died of had been read, and did not
    wait."""

    name: str
    numbers: list[int]


class Update(NamedTuple):
    """What is new of a request. Each list begins at the index before it, so that what is known already is passed over.

    seconds_since_admission: None while it waits. num_cached to num_accepted: see Request.
    """

    number: int
    first_token: int
    output_ids: list[int]
    first_logprob: int
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    first_prompt_logprob: int
    prompt_logprobs: list[float]
    prompt_top_logprobs: list[dict[int, float]]
    leaves: tuple[int, bytes, int, bytes] | None
    seconds_since_admission: float | None
    num_cached: int
    num_drafted: int
    num_accepted: int
    ending: Ending | None


class NameChanges(NamedTuple):
    """Names of blocks whose pages or states came into a replica's memory (True) or left it (False), in order."""

    pages: list[tuple[bytes, bool]]
    states: list[tuple[bytes, bool]]


class Step(NamedTuple):
    """What a step of a replica's engine gave, of all its requests."""

    updates: list[Update]
    names: NameChanges


class Refusal(NamedTuple):
    """A request that cannot run in a replica. reason: one sentence."""

    number: int
    reason: str


class Beat(NamedTuple):
    """That a replica is alive. seconds_in_step: of its engine; counts, draft_counts: see Engine."""

    seconds_in_step: float
    counts: dict[str, int]
    draft_counts: dict[str, DraftCounts]
    names: NameChanges


class Verified(NamedTuple):
    """What was found of a Verify."""

    number: int
    verdict: Verdict
