"""SamplingParams, which say what a user asks for, and Request, which holds all that is known of one sequence."""

import hashlib
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex

from lockstep.engine.answer_text import AnswerText
from lockstep.engine.cache.pages import Held
from lockstep.engine.embedding import POOLINGS, Reader
from lockstep.engine.leaves import Leaves
from lockstep.engine.sampling import Adjustment, adjusts
from lockstep.engine.speculation.acceptance import Acceptance
from lockstep.engine.speculation.lookup import Lookup, Prediction
from lockstep.ops.sampling.sample import MAX_LOGPROBS


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. ValueError if a value is not allowed.

    Choice. temperature: 0 is greedy (the lowest id wins a tie), otherwise at least 0.001. top_k: keeps the k likeliest
    tokens. top_p: keeps the likeliest tokens whose probabilities together reach this number. min_p: keeps the tokens at
    least this likely relative to the likeliest. 0, 1 and 0 keep every token. seed: the noise is a function of seed,
    position and token id only.

    Logits, changed before the choice in this order. repetition_penalty: divides the positive and multiplies the
    negative logits of tokens in the prompt or the output; 1 changes nothing. frequency_penalty: subtracted once for
    each occurrence of a token in the output. presence_penalty: subtracted once if the token occurs there. logit_bias:
    {token id: -100 to 100} to add. suppress_tokens: ids that are never chosen. logits_mask: a function, called once for
    each token with the list of output ids so far (not to be changed), that returns None or uint32[ceil(vocabulary /
    32)], whose bit i % 32 of word i // 32 allows token i (a SpeculativeMask may be asked about drafts, too). If nothing
    is allowed, or the function raises, the request ends with finish_reason "error".

    End. max_tokens: of the output. stop: stop sequences; the answer ends before the first of them to be complete, or
    after it with include_stop_str_in_output, which also keeps the text of a stop token. stop_token_ids: end an answer
    as the model's own end tokens do; with ignore_eos the model's own do not. min_tokens: in the first min_tokens tokens
    of the output no end token is chosen, unless logits_mask allows no other, and stop sequences are ignored.
    skip_special_tokens: special tokens, such as those of a chat template, have no text.

    Report. logprobs, prompt_logprobs: how many alternatives (up to 20) to report for each token of the output, and for
    each token of the prompt but the first; None: no alternatives, and for the prompt no log-probabilities at all. They
    are those of the model's own logits, before any of the changes above.

    n: how many samples of the prompt, each with a seed of its own (see `sample_seed`).

    pooling: "last" or "mean": no token is chosen, and max_tokens is 0; the request ends with its prompt's embedding
    (see `embedding.Pool`).
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    suppress_tokens: tuple[int, ...] = ()
    logits_mask: Callable[[list[int]], Any] | None = None
    n: int = 1
    pooling: str | None = None

    def __post_init__(self) -> None:
        for name, kind, low, high in BOUNDS:
            value = getattr(self, name)
            if not _is_number(value, kind) or not low <= value <= high:
                a_number = "an integer" if kind is int else "a number"
                raise ValueError(f"{name}: expected {a_number} from {low} to {high}, got {value!r:.80}")
        self._check_pooling()
        self._check_numbers()
        self._check_strings()
        self._check_bias()

    def _check_pooling(self) -> None:
        if not (self.pooling is None or (isinstance(self.pooling, str) and self.pooling in POOLINGS)):
            raise ValueError(f"pooling: expected None or one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.pooling is not None:
            object.__setattr__(self, "max_tokens", 0)
        elif self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected an integer from 1 to {MAX_TOKENS}, got {self.max_tokens!r}")
        if self.pooling is not None and (self.n > 1 or self.prompt_logprobs is not None):
            raise ValueError("pooling: expected none with n or prompt_logprobs, an embedding has no samples")

    def _check_numbers(self) -> None:
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature: expected 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value, int) and 0 <= value <= MAX_LOGPROBS):
                raise ValueError(f"{name}: expected 0 to {MAX_LOGPROBS} or None, got {value!r}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: expected at most max_tokens, {self.max_tokens}, got {self.min_tokens}")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    def _check_strings(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", *ID_LISTS):
            if not isinstance(getattr(self, name), (list, tuple, set, frozenset)):
                raise ValueError(f"{name}: expected a list, got {getattr(self, name)!r:.80}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop: expected non-empty strings, got {self.stop!r}")
        for name in ID_LISTS:
            if not all(_is_number(i, int) and i >= 0 for i in getattr(self, name)):
                raise ValueError(f"{name}: expected token ids, got {getattr(self, name)!r:.80}")

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, dict):
            raise ValueError(f"logit_bias: expected {{token id: number}}, got {self.logit_bias!r}")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for token, bias in self.logit_bias.items():
            if not _is_number(token, int) or token < 0:
                raise ValueError(f"logit_bias: expected token ids as keys, got {token!r}")
            if not _is_number(bias, (int, float)) or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token}: expected a number from -100 to 100, got {bias!r}")
        if self.logits_mask is not None and not callable(self.logits_mask):
            raise ValueError(f"logits_mask: expected a function or None, got {self.logits_mask!r}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if a token id is not one of a vocabulary of this size."""
        for name in ("logit_bias", *ID_LISTS):
            highest = max(getattr(self, name), default=0)
            if highest >= vocab_size:
                raise ValueError(f"{name}: token ids must be 0 to {vocab_size - 1}, got {highest}")


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))


MIN_TEMPERATURE = 0.001
MAX_TOKENS = 1 << 30
ID_LISTS = ("stop_token_ids", "suppress_tokens")
BOUNDS = (
    ("max_tokens", int, 0, MAX_TOKENS),
    ("temperature", (int, float), 0, 1e4),
    ("top_k", int, 0, (1 << 31) - 1),
    ("top_p", (int, float), 1e-9, 1),
    ("min_p", (int, float), 0, 1),
    ("seed", int, -(1 << 63), (1 << 63) - 1),
    ("min_tokens", int, 0, 1 << 30),
    ("repetition_penalty", (int, float), 0.01, 100),
    ("presence_penalty", (int, float), -2, 2),
    ("frequency_penalty", (int, float), -2, 2),
    ("n", int, 1, 128),
)


def token_list(token_ids: Iterable[SupportsIndex], name: str = "prompt") -> list[int]:
    """Token ids as a list of integers. ValueError, which says `name`, for anything else; also for bytes, which are text
    that was not decoded, although each byte is an integer."""
    try:
        if not isinstance(token_ids, (bytes, bytearray)):
            return list(map(operator.index, token_ids))
    except TypeError:
        pass
    raise ValueError(f"{name}: expected text or a list of token ids, got {token_ids!r:.80}")


def check_params(params: Any) -> None:
    """ValueError if params are no SamplingParams."""
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params: expected SamplingParams, got {params!r:.80}")


def check_single(params: Any) -> None:
    """ValueError for params that ask for several samples."""
    check_params(params)
    if params.n != 1:
        raise ValueError(f"n: expected 1 where one sample is asked for, got {params.n}")


def sample_seed(seed: int, index: int) -> int:
    """The seed of a prompt's sample number `index`: for 0 the seed itself; else the first 8 bytes, as a little-endian
    signed integer, of SHA-256("lockstep sample", seed as 8 and index as 4 little-endian bytes)."""
    if index == 0:
        return seed
    known = b"lockstep sample" + seed.to_bytes(8, "little", signed=True) + index.to_bytes(4, "little")
    return int.from_bytes(hashlib.sha256(known).digest()[:8], "little", signed=True)


def samples(params: SamplingParams) -> list[SamplingParams]:
    """The n SamplingParams of a prompt's samples, each with a seed of its own."""
    if params.n == 1:
        return [params]  # making and checking them again would take a tenth of the time of a small request
    return [replace(params, seed=sample_seed(params.seed, i)) for i in range(params.n)]


@dataclass(eq=False)
class PrefixState:
    """What the PrefixCache knows of one request. The Scheduler resets num_named when it takes back the pages."""

    block_names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were asked for
    num_named: int = 0  # how many of its pages bear their block's name
    known_end: int = 0  # the position where its known prefix ends, in the layers that see all keys
    branch: int | None = None  # where a known prefix ends whose recurrent state is not kept, and is worth keeping
    newest_state: bytes | None = None  # the name of the state kept last within its output, until a newer one is
    leads: list[bytes] = field(default_factory=list)  # the names of the blocks that it is the first to compute
    awaits: bytes | None = None  # the name of the block that another request computes, for which it waits


@dataclass(eq=False)
class Request:
    """One sequence: its known token ids, how many of them are computed, the memory that it holds, and how it ended."""

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    num_given: int = 0  # of output_ids, those that were known when it was made
    num_given_characters: int = 0  # of its text, those that were certain with them
    computes_given: bool = False  # whether log-probabilities of the given tokens are computed, else they are NaN
    ends_as: str | None = None  # the finish_reason that the given tokens imply, until that is done
    logprobs: list[float] = field(default_factory=list)  # of each output token; fewer while given ones are computed
    top_logprobs: list[dict[int, float]] = field(default_factory=list)  # of each output token, if asked for
    prompt_logprobs: list[float] = field(default_factory=list)  # of each prompt token but the first, if asked for
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)
    adjustment: Adjustment | None = None  # made for the first row whose logits are changed
    answer: AnswerText | None = None  # made with the first token, where there is a tokenizer
    pool: Reader | None = None  # where its hidden states are wanted, and no answer
    leaves: Leaves | None = None  # where a receipt of the answer is wanted
    num_computed: int = 0  # known tokens whose keys, values and states are in the cache
    pages: list[Held] = field(default_factory=list)  # of each group, while it runs
    slot: int | None = None  # of recurrent state, while it runs
    finish_reason: str | None = None  # "stop", "length", "embedded", "cancelled" or "error"
    stop_reason: int | str | None = None  # the token or string that ended it
    error: str | None = None  # what was wrong, where finish_reason is "error"
    refused: Exception | None = None  # the sampling.Refused behind `error`, if there was one
    is_fault: bool = False  # whether the error lies with the model or the machine, and not with the request
    priority: int = 0  # the lowest number goes first; among equals the earlier request
    cache_salt: str = ""  # only requests with the same salt share cached prefixes
    is_moved: bool = False  # whether another engine began it, and somebody waits for its next token
    admitted: float | None = None  # time.monotonic() when it first got a slot
    num_preemptions: int = 0
    acceptance: Acceptance | None = None  # made with the first draft, where the number of drafts follows what pays
    lookup: Lookup | None = None  # made with the first draft
    prediction: Prediction | None = None  # a text that its answer may resemble
    draft_state: object | None = None  # what a `draft_head.Head` keeps about it
    num_lent: int = 0  # of its pages, those that hold nothing but drafts
    num_pending: int = 0  # drafts of its last step that were right: recurrent layers have yet to absorb them
    num_drafted: int = 0  # drafts that were computed
    num_accepted: int = 0  # of num_drafted, those that were right
    num_cached: int = 0  # tokens of the prompt that the prefix cache had when it was first admitted
    prefix: PrefixState = field(default_factory=PrefixState)
    has_given_rows: bool = False  # whether steps may have rows that report log-probabilities of its known tokens
    is_adjusted: bool = False  # whether its logits may change before a token is chosen
    drawn: dict[str, Any] = field(default_factory=dict)  # fields of its SAMPLING_RECORDs that stay the same

    def __post_init__(self) -> None:
        p = self.params
        self.has_given_rows = p.prompt_logprobs is not None
        self.is_adjusted = adjusts(p)
        self.drawn = dict(temperature=p.temperature, top_p=p.top_p, min_p=p.min_p, top_k=p.top_k, seed=p.seed)

    @property
    def running_slot(self) -> int:
        """The slot of a request that runs."""
        assert self.slot is not None, f"request {self.id} waits, or has ended"
        return self.slot

    @property
    def num_reusable(self) -> int:
        """Of its first known tokens, those that cached blocks may stand in for: all but the last, and none whose row
        has yet to be reported."""
        if self.pool is not None:
            return self.num_tokens - 1 if self.pool.needs_only_last else 0
        if not self.has_given_rows:
            return self.num_tokens - 1
        return len(self.prompt_ids) - 1 + len(self.logprobs) if self._is_prompt_reported else 0

    @property
    def is_reported(self) -> bool:
        """Whether all log-probabilities of known tokens that it asks for are computed."""
        return self._is_prompt_reported and len(self.logprobs) == len(self.output_ids)

    @property
    def _is_prompt_reported(self) -> bool:
        return self.params.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.prompt_ids) - 1

    @property
    def text(self) -> str:
        """The text of the answer as far as it is certain; it only grows."""
        return "" if self.answer is None else self.answer.text

    @property
    def num_tokens(self) -> int:
        """Known tokens: of the prompt and of the answer so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_left(self) -> int:
        """Tokens that are known but not computed; 1 while it decodes."""
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed

    @property
    def max_num_tokens(self) -> int:
        """The most tokens that it may come to."""
        return len(self.prompt_ids) + self.params.max_tokens

    def token_ids(self, start: int, end: int) -> list[int]:
        """Known token ids at positions start .. end, without end."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:] + self.output_ids[max(0, start - num_prompt) : end - num_prompt]
