"""The reference of the promise: the results of a sequence that runs alone, one token a step, on one thread."""

import hashlib
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere, pages_for
from lockstep.engine.request import SamplingParams
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.sampling import Adjustment
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, by_position
from lockstep.runtime.threads import Team

ALTERNATIVES = 3
# every tiny vocabulary has these tokens
WISHES = Adjustment(
    [3, 5, 3],
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=9, logit_bias={0: 1.5, 7: -2.0}),
    frozenset({2}),
    90,
)


@dataclass(frozen=True)
class Sequence:
    """Token ids, and the sampling parameters of each position."""

    name: str
    token_ids: list
    seed: int

    def sampling(self, position):
        """Fields of a SAMPLING_RECORD: every third position is greedy, the others draw; two of three adjust logits."""
        temperature = (0.0, 0.8, 1.3)[(position + self.seed) % 3]
        return dict(
            temperature=temperature,
            top_p=(1.0, 0.9)[position % 2],
            min_p=0.0,
            top_k=(0, 40)[position // 2 % 2],
            seed=self.seed,
            position=position + 1,
            num_logprobs=ALTERNATIVES,
            **(WISHES.rows([5, 8, 5])[0] if position % 3 else {}),
        )


@dataclass(frozen=True)
class Trace:
    """The results of a Sequence that ran alone. logits [n, V], hidden [n, D], tokens [n], logprobs [n]. reports [n]:
    see `report`. states [n]: digest of the recurrent state after each token. cache: {name of a cache of pages: the
    bytes of every position [n, ...]}."""

    logits: np.ndarray
    hidden: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    reports: list
    states: list
    cache: dict


def report(runner, row):
    """Bytes of a sampled row's likeliest tokens, their log-probabilities, and its adjusted logits, if there are any."""
    sample = runner.sample
    parts = [(sample.top_token, ALTERNATIVES), (sample.top_logprob, ALTERNATIVES)]
    if runner.is_adjusted(row):
        parts.append((sample.adjusted, sample.vocab_size))
    return b"".join(runner.executor.view(t, row + 1)[row, :width].tobytes() for t, width in parts)


def state_digest(runner, slot):
    """Digest of all recurrent state of a slot. It is SHA-256, for which processors have instructions, since it takes a
    large part of the time of these tests."""
    state = hashlib.sha256()
    for cache in runner.program.caches:
        if cache.kind == "state":
            state.update(runner.caches[cache.name].reshape(runner.limits.max_requests, -1)[slot])
    return state.hexdigest()


def positions(runner, pages, count):
    """{name of a cache of pages: (first position that the request holds, bytes of the positions from there to `count`:
    [n, heads, head size, bytes])}."""
    held_bytes = {}
    for cache in (c for c in runner.program.caches if c.kind == "pages"):
        held = pages[cache.group] if len(pages) > 1 else pages[0]
        memory = runner.caches[cache.name].reshape(-1, *cache.shape, cache.bytes_each // int(np.prod(cache.shape)))
        start = held.first * PAGE_TOKENS
        held_bytes[cache.name] = start, by_position(memory[held.ids], cache.name.endswith("k_pages"))[: count - start]
    return held_bytes


def whole(runner, pages, count):
    """{name of a cache of pages: the bytes of all positions}, where the pages hold them all."""
    return {name: rows for name, (_, rows) in positions(runner, pages, count).items()}


def trace(model, sequence):
    """Runs a sequence alone on fresh memory."""
    n = len(sequence.token_ids)
    pages = everywhere(range(pages_for(n)))
    team = Team(1)
    try:
        runner = Runner(model, team, Limits(1, 1, pages[0].end, 1))
        rows, reports, states = [], [], []
        for p, token in enumerate(sequence.token_ids):
            tokens, logprobs, logits = runner.step([Span([token], p, pages, 0, {0: sequence.sampling(p)}, [0])])
            rows.append((logits[0].copy(), runner.hidden(0, 1)[0].copy(), tokens[0], logprobs[0]))
            reports.append(report(runner, 0))
            states.append(state_digest(runner, 0))
        logits, hidden, tokens, logprobs = (np.array(column) for column in zip(*rows, strict=True))
        assert np.isfinite(logits).all(), f"{sequence.name}: logits are not finite"
        return Trace(logits, hidden, tokens, logprobs, reports, states, whole(runner, pages, n))
    finally:
        team.close()
