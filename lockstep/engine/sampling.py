"""Which rows of a step sample a request's tokens, and what each row's SAMPLING_RECORD says: temperature, seed,
penalties, masks.

Log-probabilities of known tokens, of a prompt or of an answer that goes on, come from sampled rows, too: the row of
token i says how likely token i + 1 was.
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
    """A request cannot be sampled because of what it asks for; the message says why."""


class NothingAllowed(Refused):
    """The mask, suppressed tokens and min_tokens of a request together forbid every token."""

    def __init__(self) -> None:
        super().__init__("no token is allowed by logits_mask, suppress_tokens and min_tokens together")


class Adjustment:
    """The memory that the op `adjust_logits` reads for one request: the log of seen tokens, biases, masks and banned
    end tokens. All of it is allocated here.

    The log has an entry for each token of the output, in order, so that its first n entries are what had been seen at
    an earlier position: all drafts of a step share one log.
    """

    def __init__(
        self, prompt_ids: Sequence[int], params: "SamplingParams", eos_ids: frozenset[int], vocab_size: int
    ) -> None:
        self._params, self._num_logged, self._suppressed = params, 0, frozenset(params.suppress_tokens)
        self._drafts: list[int] = []  # the drafts at the end of the log
        self._counts: Counter[int] = Counter()  # how often each token is in the log
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
        """Fields of SAMPLING_RECORDs, one dict for the token after the output and one for the token after each draft;
        the first `first` dicts are left out. A dict is empty where no logit changes. There are fewer dicts where the
        mask ends before the last draft. Refused for a bad mask.

        drafts: tokens that are assumed to follow the output, until the next call.
        """
        num_seen = self._log(output_ids, drafts)
        masks = self._masks(output_ids, drafts, first)
        return [
            self._fields(len(output_ids) + i, num_seen + i * self._counts_output, mask)
            for i, mask in enumerate(masks, first)
        ]

    def forbidden_by(self, output_ids: list[int], token: int) -> str | None:
        """The name of the parameter that forbids a token after the output; None if it is allowed. Refused for a bad
        mask."""
        [mask] = self._masks(output_ids, (), 0)
        if mask is not None and not int(mask[token // 32]) >> token % 32 & 1:
            return "logits_mask"
        if token in self._suppressed:
            return "suppress_tokens"
        return "min_tokens" if token in self._banned[: self._num_banned(len(output_ids), mask)] else None

    def _num_banned(self, num_output: int, mask: np.ndarray | None) -> int:
        """How many end tokens are banned as the token after num_output tokens of output: all or none."""
        num_banned = len(self._banned) if num_output < self._params.min_tokens else 0
        if mask is not None and num_banned and not self._may_go_on(mask):
            return 0  # the mask allows end tokens only, as where a grammar is complete
        return num_banned

    def _fields(self, num_output: int, num_seen: int, mask: np.ndarray | None) -> dict[str, int]:
        """The fields of the row that chooses the token after num_output tokens of output."""
        num_banned = self._num_banned(num_output, mask)
        if not (num_seen or num_banned or mask is not None or len(self._bias)):
            return {}
        address = 0 if mask is None else mask.ctypes.data
        return dict(adjustment=self._record.ctypes.data, mask=address, num_seen=num_seen, num_banned=num_banned)

    def _log(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        """Brings the log up to the output and the drafts; returns how many entries come before the drafts."""
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
        """Whether a mask allows a token that is no end token."""
        without_ends = mask.copy()
        np.bitwise_and.at(without_ends, self._banned // 32, ~(np.uint32(1) << (self._banned % 32).astype(np.uint32)))
        return bool(without_ends.any())

    def _masks(self, output_ids: list[int], drafts: Sequence[int], first: int) -> list[np.ndarray | None]:
        """The masks of the rows, each in memory of its own until the next call; None for a row without a mask."""
        mask_of = self._params.logits_mask
        if mask_of is None:
            return [None] * (len(drafts) + 1 - first)
        if len(drafts) >= len(self._bits):
            self._bits = np.zeros((len(drafts) + 1, self._bits.shape[1]), np.uint32)
        try:
            if isinstance(mask_of, SpeculativeMask):
                masks = mask_of.masks(output_ids, drafts, first)
            else:
                masks = [mask_of(output_ids)]
            return [self._written(row, mask) for row, mask in enumerate(masks, first)]
        except Refused:
            raise
        except Exception as error:  # a caller's function: an error of any class ends this request and no other
            raise Refused(f"logits_mask raised {type(error).__name__}: {error}") from error

    def _written(self, row: int, mask: Any) -> np.ndarray | None:
        """A copy of a row's mask in memory that the op reads. Refused for a mask of another type or length."""
        if mask is None:
            return None
        bits, own = np.asarray(mask), self._bits[row]
        if bits.dtype not in (np.uint32, np.int32) or bits.shape != own.shape:
            raise Refused(f"logits_mask: expected None or uint32 [{len(own)}], got {bits.dtype} {list(bits.shape)}")
        own[:] = bits.view(np.uint32)
        return own


def adjusts(params: "SamplingParams") -> bool:
    """Whether a request with these SamplingParams may change its logits before a token is chosen."""
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
    start. There are fewer rows where the request's mask ends before the last draft. Refused for a bad mask."""
    rows = given_rows(request, start, end) if request.has_given_rows else {}
    if end == request.num_tokens and request.pool is None:
        num_logprobs = request.params.logprobs or 0
        for row, fields in enumerate(choices(request, eos_ids, vocab_size, drafts), end - 1 - start):
            fields["num_logprobs"] = num_logprobs
            rows[row] = fields
    return rows


def given_rows(request: "Request", start: int, end: int) -> dict[int, dict[str, Any]]:
    """The rows that report known tokens which have no log-probability yet: of the prompt, if it asks for them, and of
    the answer."""
    p, prompt, rows = request.params, request.prompt_ids, {}
    last, num_reported = len(prompt) - 1, len(request.prompt_logprobs)
    if p.prompt_logprobs is not None:
        assert start <= num_reported or num_reported == last, (start, num_reported)  # else a row was skipped
        for at in range(max(start, num_reported), min(end, last)):
            rows[at - start] = dict(given=1 + prompt[at + 1], num_logprobs=p.prompt_logprobs)
    num_reported = len(request.logprobs)
    if num_reported < len(request.output_ids):
        assert start <= last + num_reported, (start, last, num_reported)
        for at in range(max(start, last + num_reported), min(end, last + len(request.output_ids))):
            rows[at - start] = dict(given=1 + request.output_ids[at - last], num_logprobs=p.logprobs or 0)
    return rows


def adjustment_of(request: "Request", eos_ids: frozenset[int], vocab_size: int) -> Adjustment:
    """The Adjustment of a request that `is_adjusted`, made when it is first asked for."""
    if request.adjustment is None:
        request.adjustment = Adjustment(request.prompt_ids, request.params, eos_ids, vocab_size)
    return request.adjustment


def choices(
    request: "Request", eos_ids: frozenset[int], vocab_size: int, drafts: Sequence[int] = (), first: int = 0
) -> list[dict[str, Any]]:
    """Fields of the SAMPLING_RECORDs that choose the token after a request's known tokens and the token after each
    draft; the first `first` of them are left out. Fewer where the request's mask ends. Refused for a bad mask."""
    position, drawn, adjusted = request.num_tokens, request.drawn, [{}] * (len(drafts) + 1 - first)
    if request.is_adjusted:
        adjusted = adjustment_of(request, eos_ids, vocab_size).rows(request.output_ids, drafts, first)
    return [{"position": position + i, **drawn, **fields} for i, fields in enumerate(adjusted, first)]


def guessed(request: "Request", eos_ids: frozenset[int], vocab_size: int, drafts: Sequence[int] = ()) -> dict[str, Any]:
    """Fields of a SAMPLING_RECORD with which a draft model chooses the token after a request's drafts as the model
    itself would. A mask that does not know which tokens are allowed there is left out: a draft may be wrong."""
    try:
        fields = choices(request, eos_ids, vocab_size, drafts, len(drafts))
    except Refused:  # the model's own next token will be refused for the same reason
        fields = []
    return fields[0] if fields else dict(position=request.num_tokens + len(drafts))


def take_given_rows(request: "Request", span: "Span", row: int, runner: "Runner", logprobs: list[float]) -> int:
    """Adds the log-probabilities of known tokens, of the prompt and then of the answer, that a span's rows from `row`
    on give; returns the row after them."""
    if not request.has_given_rows:
        return row
    p, end = request.params, row + sum("given" in fields for fields in span.sampled.values())
    if p.prompt_logprobs is not None:
        of_prompt = range(row, min(end, row + len(request.prompt_ids) - 1 - len(request.prompt_logprobs)))
        request.prompt_logprobs += logprobs[row : of_prompt.stop]
        if p.prompt_logprobs:
            request.prompt_top_logprobs += [runner.alternatives(r, p.prompt_logprobs) for r in of_prompt]
        row = of_prompt.stop
    request.logprobs += logprobs[row:end]
    if p.logprobs:
        request.top_logprobs += [runner.alternatives(r, p.logprobs) for r in range(row, end)]
    return end


def is_finite(request: "Request", logprob: float, alternatives: dict[int, float]) -> bool:
    """Whether all log-probabilities of a token are finite; with the first token that is chosen, those of the known
    tokens, too."""
    is_first = len(request.output_ids) == request.num_given
    if not (is_first or alternatives):
        return math.isfinite(logprob)
    return all(map(math.isfinite, [logprob, *alternatives.values()])) and (not is_first or are_given_finite(request))


def are_given_finite(request: "Request") -> bool:
    """Whether all log-probabilities of a request's known tokens that were computed are finite."""
    computed = [*request.prompt_logprobs, *(request.logprobs[: request.num_given] if request.computes_given else ())]
    for alternatives in [*request.prompt_top_logprobs, *request.top_logprobs[: request.num_given]]:
        computed += alternatives.values()
    return all(map(math.isfinite, computed))


def within_rows(plan: list[tuple["Request", int]], max_sampled: int) -> list[tuple["Request", int]]:
    """The plan [(request, number of tokens), ...] with requests that want log-probabilities of known tokens cut so that
    all sampled rows of the step fit.

    There are at least as many rows as requests; the tokens that are cut off run in a later step.
    """
    left, fitting = max_sampled - sum(not r.has_given_rows for r, _ in plan), []
    for request, num_tokens in plan:
        if request.has_given_rows:
            if request.ends_as is not None:  # no token follows its last, which therefore is not computed
                num_tokens = min(num_tokens, request.num_left - 1)
            num_tokens = largest_within(request, num_tokens, left)
            left -= num_rows(request, num_tokens)
        if num_tokens:
            fitting.append((request, num_tokens))
    return fitting


def num_rows(request: "Request", num_tokens: int) -> int:
    """How many sampled rows the next `num_tokens` tokens of a request need, at most: a prompt that reports nothing
    counts as if it did, which leaves few drafts to the others of a step with a long prompt."""
    start, end, last = request.num_computed, request.num_computed + num_tokens, len(request.prompt_ids) - 1
    of_prompt = of_answer = 0
    if request.params.prompt_logprobs is not None or not request.has_given_rows:
        of_prompt = max(0, min(end, last) - max(start, len(request.prompt_logprobs)))
    if request.has_given_rows:
        of_answer = max(0, min(end, last + len(request.output_ids)) - max(start, last + len(request.logprobs)))
    return of_prompt + of_answer + (end == request.num_tokens and num_tokens > 0)


def largest_within(request: "Request", num_tokens: int, max_rows: int) -> int:
    """The most tokens, up to `num_tokens`, that need at most max_rows sampled rows."""
    excess = num_rows(request, num_tokens) - max_rows
    while excess > 0:
        num_tokens -= excess
        excess = num_rows(request, num_tokens) - max_rows
    return num_tokens
