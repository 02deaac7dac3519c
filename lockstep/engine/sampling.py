"""What a request asks of the rows in which it is sampled, and which rows those are.

Log-probabilities of a prompt come from rows of their own: the row of token i says how likely token i + 1 was.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.ops.sampling.adjust_logits import ADJUSTMENT_RECORD
from lockstep.text.speculative_mask import SpeculativeMask

if TYPE_CHECKING:
    from lockstep.engine.request import Request, SamplingParams
    from lockstep.engine.runner import Runner, Span


class Refused(Exception):
    """A request that cannot be sampled, through a fault of its own; the message says why."""


class NothingAllowed(Refused):
    """What a request asks for leaves no token to choose."""

    def __init__(self) -> None:
        super().__init__("no token is allowed by logits_mask, suppress_tokens and min_tokens together")


class Adjustment:
    """Memory that the op `adjust_logits` reads for one request: what it has seen, biases, mask and banned tokens.

    All of it is allocated here. What was seen is a log in the order of the output, so that any first part of it is what
    had been seen at an earlier position.
    """

    def __init__(
        self, prompt_ids: Sequence[int], params: "SamplingParams", eos_ids: frozenset[int], vocab_size: int
    ) -> None:
        self._params, self._num_logged = params, 0
        self._drafts: list[int] = []  # the last that are logged
        self._counts: Counter[int] = Counter()
        repeats = params.repetition_penalty != 1
        self._prompt = list(dict.fromkeys(prompt_ids)) if repeats else []
        self._counts_output = bool(repeats or params.presence_penalty or params.frequency_penalty)
        self._seen = np.zeros((len(self._prompt) + params.max_tokens * self._counts_output, 2), np.int32)
        self._seen[: len(self._prompt), 0] = self._prompt
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self._banned = np.array(sorted(i for i in ends if i < vocab_size), np.int32)
        biases = {**params.logit_bias, **dict.fromkeys(params.suppress_tokens, -np.inf)}
        self._bias_ids = np.array(list(biases), np.int32)
        self._bias = np.array(list(biases.values()), np.float32)
        self._bits = np.zeros((1, -(-vocab_size // 32)), np.uint32)  # a mask for each row
        self._record = np.zeros(1, ADJUSTMENT_RECORD)
        memory = [a.ctypes.data for a in (self._seen, self._bias_ids, self._bias, self._banned)]
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self._record[0] = (*memory, len(self._bias), *penalties)

    def rows(self, output_ids: list[int], drafts: Sequence[int] = (), first: int = 0) -> list[dict[str, int]]:
        """Fields of the SAMPLING_RECORDs of the token after the output, and of that after each draft, from that after
        the first `first` drafts on: none in a row of which nothing is asked. Fewer where a mask does not go on. Refused
        for a bad mask.

        drafts: tokens that are taken to follow the output until the next call.
        """
        num_seen = self._log(output_ids, drafts)
        masks = self._masks(output_ids, drafts, first)
        return [
            self._fields(len(output_ids) + i, num_seen + i * self._counts_output, mask)
            for i, mask in enumerate(masks, first)
        ]

    def _fields(self, num_output: int, num_seen: int, mask: np.ndarray | None) -> dict[str, int]:
        """The fields of one row, after so many tokens of output."""
        num_banned = len(self._banned) if num_output < self._params.min_tokens else 0
        if mask is not None and num_banned and not self._may_go_on(mask):
            num_banned = 0  # a grammar that is complete ends the answer: nothing else is allowed
        if not (num_seen or num_banned or mask is not None or len(self._bias)):
            return {}
        address = 0 if mask is None else mask.ctypes.data
        return dict(adjustment=self._record.ctypes.data, mask=address, num_seen=num_seen, num_banned=num_banned)

    def _log(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        """Logs what the rows have seen; returns how much of it the first of them has."""
        if not self._counts_output:
            return len(self._prompt)
        self._counts.subtract(self._drafts)
        self._num_logged -= len(self._drafts)
        self._drafts = list(drafts)
        for token in output_ids[self._num_logged :] + self._drafts:
            self._counts[token] += 1
            self._seen[len(self._prompt) + self._num_logged] = token, self._counts[token]
            self._num_logged += 1
        return len(self._prompt) + self._num_logged - len(drafts)

    def _may_go_on(self, mask: np.ndarray) -> bool:
        """Whether a mask allows a token that ends nothing."""
        others = mask.copy()
        np.bitwise_and.at(others, self._banned // 32, ~(np.uint32(1) << (self._banned % 32).astype(np.uint32)))
        return bool(others.any())

    def _masks(self, output_ids: list[int], drafts: Sequence[int], first: int) -> list[np.ndarray | None]:
        """The masks of the rows, each in memory of its own until the next call; None in a row that has none."""
        ask = self._params.logits_mask
        if ask is None:
            return [None] * (len(drafts) + 1 - first)
        if len(drafts) >= len(self._bits):
            self._bits = np.zeros((len(drafts) + 1, self._bits.shape[1]), np.uint32)
        try:
            masks = ask.masks(output_ids, drafts, first) if isinstance(ask, SpeculativeMask) else [ask(output_ids)]
            return [self._written(row, mask) for row, mask in enumerate(masks, first)]
        except Refused:
            raise
        except Exception as error:  # a caller's function: whatever it raises ends this request and no other
            raise Refused(f"logits_mask raised {type(error).__name__}: {error}") from error

    def _written(self, row: int, mask: Any) -> np.ndarray | None:
        """A copy of a row's mask that the op can read."""
        if mask is None:
            return None
        bits, own = np.asarray(mask), self._bits[row]
        if bits.dtype not in (np.uint32, np.int32) or bits.shape != own.shape:
            raise Refused(f"logits_mask: expected None or uint32 [{len(own)}], got {bits.dtype} {list(bits.shape)}")
        own[:] = bits.view(np.uint32)
        return own


def adjusts(params: "SamplingParams") -> bool:
    """Whether a request may change its logits before a token is chosen."""
    return bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.suppress_tokens
        or params.min_tokens
        or params.logits_mask
    )


def sampled_rows(
    request: "Request", start: int, end: int, eos_ids: frozenset[int], vocab_size: int, drafts: Sequence[int] = ()
) -> dict[int, dict[str, Any]]:
    """{row: fields of a SAMPLING_RECORD} for tokens start .. end of a request and drafts after them, rows counted from
    start; or Refused. There are fewer where its mask does not go on to the last draft."""
    p, prompt = request.params, request.prompt_ids
    rows: dict[int, dict[str, Any]] = {}
    if p.prompt_logprobs is not None:
        reported = len(request.prompt_logprobs)
        assert start <= reported or reported == len(prompt) - 1, (start, reported)  # else a row was never computed
        for at in range(max(start, reported), min(end, len(prompt) - 1)):
            rows[at - start] = dict(given=1 + prompt[at + 1], num_logprobs=p.prompt_logprobs)
    if end == request.num_tokens and request.pool is None:
        for i, fields in enumerate(choices(request, eos_ids, vocab_size, drafts)):
            rows[end - 1 - start + i] = fields | dict(num_logprobs=p.logprobs or 0)
    return rows


def choices(
    request: "Request", eos_ids: frozenset[int], vocab_size: int, drafts: Sequence[int] = (), first: int = 0
) -> list[dict[str, Any]]:
    """Fields of the SAMPLING_RECORDs that choose the token after all known ones of a request, and those after each
    draft, from that after the first `first` drafts on; fewer where its mask does not go on. Or Refused."""
    p, wishes = request.params, [{}] * (len(drafts) + 1 - first)
    if request.adjustment is None and adjusts(p):
        request.adjustment = Adjustment(request.prompt_ids, p, eos_ids, vocab_size)
    if request.adjustment is not None:
        wishes = request.adjustment.rows(request.output_ids, drafts, first)
    how = dict(temperature=p.temperature, top_p=p.top_p, min_p=p.min_p, top_k=p.top_k, seed=p.seed)
    return [dict(position=request.num_tokens + i, **how, **fields) for i, fields in enumerate(wishes, first)]


def guessed(request: "Request", eos_ids: frozenset[int], vocab_size: int, drafts: Sequence[int] = ()) -> dict[str, Any]:
    """Fields of a SAMPLING_RECORD that choose what may follow drafts of a request as it would be chosen. Where a mask
    cannot say what is allowed there, everything is: it is a guess."""
    try:
        made = choices(request, eos_ids, vocab_size, drafts, len(drafts))
    except Refused:  # the token that is certain is refused alike
        made = []
    return made[0] if made else dict(position=request.num_tokens + len(drafts))


def take_prompt_rows(request: "Request", span: "Span", row: int, runner: "Runner", logprobs: np.ndarray) -> int:
    """Takes in what the rows of a span from `row` on say about the prompt; returns the row after them."""
    if request.params.prompt_logprobs is None:
        return row
    end, num_top = row + sum("given" in fields for fields in span.sampled.values()), request.params.prompt_logprobs
    request.prompt_logprobs += logprobs[row:end].tolist()
    if num_top:
        request.prompt_top_logprobs += [runner.alternatives(r, num_top) for r in range(row, end)]
    return end


def is_finite(request: "Request", logprob: float, alternatives: dict[int, float]) -> bool:
    """Whether the log-probabilities that come with a token are all numbers; with the first token, the prompt's, too."""
    if request.output_ids and not alternatives:
        return math.isfinite(logprob)
    found = [logprob, *alternatives.values()]
    if not request.output_ids:
        found += request.prompt_logprobs
        for each in request.prompt_top_logprobs:
            found += each.values()
    return all(map(math.isfinite, found))


def within_rows(plan: list[tuple["Request", int]], max_sampled: int) -> list[tuple["Request", int]]:
    """The plan [(request, count), ...] with prompts that want log-probabilities cut so that all sampled rows fit.

    There are at least as many rows as requests; what a prompt does not get now it gets in the next step.
    """
    left, made = max_sampled - sum(r.params.prompt_logprobs is None for r, _ in plan), []
    for request, count in plan:
        if request.params.prompt_logprobs is not None:
            count = largest_within(request, count, left)
            left -= num_rows(request, count)
        if count:
            made.append((request, count))
    return made


def num_rows(request: "Request", count: int) -> int:
    """How many rows the next `count` tokens of a request need."""
    start, end = request.num_computed, request.num_computed + count
    prompt = max(0, min(end, len(request.prompt_ids) - 1) - max(start, len(request.prompt_logprobs)))
    return prompt + (end == request.num_tokens and count > 0)


def largest_within(request: "Request", count: int, rows: int) -> int:
    """The most tokens, up to count, that need at most so many rows."""
    spare = num_rows(request, count) - rows
    while spare > 0:
        count -= spare
        spare = num_rows(request, count) - rows
    return count
