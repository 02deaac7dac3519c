"""Answers of a fleet whose replicas die, hang and make room, against the same answers of one engine that nothing
interrupts."""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from lockstep.engine.async_engine import StreamEngine
from lockstep.engine.request import Request, SamplingParams
from lockstep.engine.token_stream import Token, TokenStream
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.form import form_of
from lockstep.replicas.fleet import Fleet
from lockstep.replicas.link import READY, Link, Running
from tests.resume.proof import with_stops
from tests.speculation.subjects import Subject, bundled
from tests.speculation.wishes import Wish, wishes

LONG = 12  # of each hundred wishes, how many have long answers, so that most kills find something that runs


@dataclass
class Asked:
    """A wish with or without a receipt, and what nothing interrupted answered: Requests and texts of its samples."""

    wish: Wish
    receipt: bool
    answers: list[Request] = field(default_factory=list)

    def submit(self, engine: StreamEngine) -> list[TokenStream]:
        """Queues its samples."""
        wish = self.wish
        params = replace(wish.params, logits_mask=wish.new_mask()) if wish.new_mask else wish.params
        options = dict(priority=wish.priority, cache_salt=wish.cache_salt, prediction=wish.prediction)
        return engine.submit_all([(wish.prompt_ids, params)], receipt=self.receipt, **options)


def subject() -> Subject:
    """The bundled model, with stop sequences."""
    return with_stops(bundled())


def asked(of: Subject, seed: int, count: int) -> list[Asked]:
    """Random wishes that another process can be told; a third of them with receipts, some with long answers."""
    rng, made = np.random.default_rng(seed), []
    for wish in wishes(of, seed, count):
        try:
            form_of(wish.new_mask() if wish.new_mask else None)
        except ReceiptError:  # a function of the caller's own
            wish = replace(wish, new_mask=None)
        if rng.random() < LONG / 100 and wish.params.pooling is None and wish.new_mask is None:
            wish = replace(wish, params=_long(wish.params))
        made.append(Asked(wish, bool(rng.random() < 0.3)))
    return made


def _long(params: SamplingParams) -> SamplingParams:
    return replace(params, max_tokens=400, ignore_eos=True, stop=(), stop_token_ids=())


def read_all(streams: list[TokenStream], seconds: float = 120.0) -> list[list[Token]]:
    """The tokens of streams, when all have ended. TimeoutError if they do not."""
    deadline, made = time.monotonic() + seconds, []
    for stream in streams:
        while stream.finish_reason is None and stream.error is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{stream!r} did not end within {seconds:g} s")
            time.sleep(0.002)
        made.append(list(stream))
    return made


def answer_all(menu: list[Asked], engine: StreamEngine) -> None:
    """Notes the answers of an engine that nothing interrupts."""
    streams = [each.submit(engine) for each in menu]
    for each, samples in zip(menu, streams, strict=True):
        read_all(samples)
        each.answers = [stream.request for stream in samples]


def bits(values: list[float]) -> bytes:
    """Log-probabilities as the bytes of float32."""
    return np.array(values, np.float32).tobytes()


FIELDS: dict[str, Callable[[Request], object]] = {
    "tokens": lambda r: r.output_ids,
    "text": lambda r: r.text,
    "log-probabilities": lambda r: bits(r.logprobs),
    "alternatives": lambda r: r.top_logprobs,
    "log-probabilities of the prompt": lambda r: (bits(r.prompt_logprobs), r.prompt_top_logprobs),
    "finish reason": lambda r: (r.finish_reason, r.stop_reason, r.error, r.is_fault),
    "leaves": lambda r: None if r.leaves is None else (bytes(r.leaves.answer), bytes(r.leaves.prompt)),
    "embedding": lambda r: None if r.pool is None else r.pool.embedding().tobytes(),  # type: ignore[attr-defined]
    "usage": lambda r: (len(r.prompt_ids), len(r.output_ids)),
}


def differences(each: Asked, streams: list[TokenStream], tokens: list[list[Token]]) -> list[str]:
    """What differs in an answer, and in what its reader saw."""
    found = []
    for number, (before, stream, read) in enumerate(zip(each.answers, streams, tokens, strict=True)):
        after = stream.request
        found += [f"sample {number}: {name} differ" for name, of in FIELDS.items() if of(before) != of(after)]
        if [token.id for token in read] != before.output_ids or [token.index for token in read] != [*range(len(read))]:
            found.append(f"sample {number}: its reader got other tokens")
        if "".join(token.text for token in read) != before.text:
            found.append(f"sample {number}: its reader got another text")
    return [f"{what}: {each.wish}"[:1500] for what in found]


# ------------------------------------------------------------ faults


def ready_links(fleet: Fleet) -> list[Link]:
    """The replicas that run requests."""
    return [link for link in list(fleet.links.values()) if link.state == READY]


def kill(link: Link) -> None:
    """Kills a replica's process."""
    _signal(link, signal.SIGKILL)


def stop(link: Link) -> None:
    """Stops a replica's process, until `go_on`."""
    _signal(link, signal.SIGSTOP)


def go_on(link: Link) -> None:
    """Lets a stopped process go on."""
    _signal(link, signal.SIGCONT)


def _signal(link: Link, number: signal.Signals) -> None:
    assert link.ready is not None
    with contextlib.suppress(ProcessLookupError):  # its fleet ended it first
        os.kill(link.ready.pid, number)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for a condition. AssertionError if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


class Gap(NamedTuple):
    """How long a stream stood still after a kill. num_tokens: how many its new replica was given to compute with it, of
    all streams that came from the killed one; cached ones count, too."""

    seconds: float
    num_tokens: int


def gaps(link: Link, fleet: Fleet, seconds: float = 5.0) -> list[Gap]:
    """Kills a replica; returns the Gap of each stream that it had begun, until the next token or the end."""
    streams = list(link.streams.values())
    before = {each: len(each.request.output_ids) for each in streams if each.request.output_ids}
    made, homes, began = dict[Running, float](), dict[Running, Link | None](), time.monotonic()
    kill(link)
    while len(made) < len(before) and time.monotonic() - began < seconds:
        for each in streams:
            if each.home not in (None, link):
                homes[each] = each.home
        for each, count in before.items():
            request = each.request
            if each not in made and (len(request.output_ids) > count or request.finish_reason is not None):
                made[each] = time.monotonic() - began
        time.sleep(0.001)
    tokens = Counter[Link | None]()
    for each, home in homes.items():
        tokens[home] += each.request.num_tokens
    return [Gap(made.get(each, seconds), tokens[homes.get(each)]) for each in before]


def prefill_speed(engine: StreamEngine, num_prompts: int = 8, num_tokens: int = 256) -> float:
    """How many tokens of prompts that nothing has computed before an engine computes in a second."""
    rng, began = np.random.default_rng(), time.monotonic()
    prompts = rng.integers(100, 400, (num_prompts, num_tokens)).tolist()
    read_all(engine.submit_all([(prompt, SamplingParams(max_tokens=1)) for prompt in prompts]))
    return num_prompts * num_tokens / (time.monotonic() - began)


def moments(fleet: Fleet) -> Counter[str]:
    """In which part of their answers the fleet's streams are now."""
    made: Counter[str] = Counter()
    for link in list(fleet.links.values()):
        for each in list(link.streams.values()):
            request = each.request
            left = request.params.max_tokens - len(request.output_ids)
            made["prefill" if not request.output_ids else "last token" if left <= 1 else "answer"] += 1
    return made
