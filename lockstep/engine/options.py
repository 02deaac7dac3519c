"""EngineOptions: sizes of an engine, its prefix cache and its speculative decoding."""

import os
from dataclasses import dataclass

from lockstep.engine.speculation.drafts import MAX_DRAFTS, MODEL, MOST_BY_ITSELF, SOURCES
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

MANY = (1 << 31) - 1
LOWEST = {
    "max_step_tokens": 1,
    "max_requests": 1,
    "spare_requests": 0,
    "kv_tokens": PAGE_TOKENS,
    "threads": 1,
    "state_bytes": 0,
    "state_every": PAGE_TOKENS,
    "prompt_state_from": 0,
    "cache_dir_bytes": 0,
    "draft": 1,
    "num_engines": 1,
}
HIGHEST = {"kv_tokens": 1 << 62, "state_bytes": 1 << 62, "cache_dir_bytes": 1 << 62, "draft": MAX_DRAFTS}
MAY_BE_NONE = ("kv_tokens", "threads", "prompt_state_from", "draft")


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine. ValueError for a value that is not allowed.

    Steps. max_step_tokens, max_requests: the most tokens and requests of one step. spare_requests: how many requests
    that another engine began may run beside max_requests of this one's own. threads: None: one for each core.

    KV cache. kv_tokens: its tokens, all requests together; layers with a window keep only those that requests may see.
    The memory is claimed at once, or, if not claims_kv, as it is used. None: enough for max_requests full contexts, up
    to 2 GiB, but at least for one full context (see cache/size.py), claimed as it is used. num_engines: how many
    engines of these options share this machine's free memory.

    Prefix cache. prefix_cache: whether a request uses what others computed for the same first tokens. state_bytes:
    memory for kept recurrent states, for models that have such states. state_every: tokens from one kept state to the
    next, a multiple of 64. prompt_state_from: the length from which a state is also kept near the end of a prompt;
    None: 2048, or 0 with a cache_dir. Keeping it takes a step of its own, which costs a shorter prompt more than 3 %.
    cache_dir: a folder that keeps prefixes across restarts, of at most cache_dir_bytes; processes may share it.

    Speculative decoding: drafts are guesses of the next tokens, computed in one step and kept where they are what the
    model chooses, so that no answer changes. speculate: where drafts come from. "lookup": what followed the same few
    tokens in the prompt, the answer, its prediction or an earlier answer. "mtp": the model's own multi-token-prediction
    head. "auto": both, or lookup where the model has no MTP head. "model": a smaller draft model. "off": no drafts.
    draft: the number of drafts of a request in a step, 1 to 15; None: as many as pay, up to 7.
    """

    max_step_tokens: int = 512
    max_requests: int = 16
    spare_requests: int = 0
    kv_tokens: int | None = None
    threads: int | None = None
    prefix_cache: bool = True
    state_bytes: int = 512 << 20
    state_every: int = 512
    prompt_state_from: int | None = None
    cache_dir: str | os.PathLike | None = None
    cache_dir_bytes: int = 8 << 30
    speculate: str = "off"
    draft: int | None = None
    num_engines: int = 1
    claims_kv: bool = True

    def __post_init__(self) -> None:
        for name, low in LOWEST.items():
            value, high = getattr(self, name), HIGHEST.get(name, MANY)
            if (type(value) is int and low <= value <= high) or (value is None and name in MAY_BE_NONE):
                continue
            raise ValueError(f"{name}: expected an integer of at least {low} (and at most {high}), got {value!r:.80}")
        choices = (*SOURCES, MODEL)
        if not (isinstance(self.speculate, str) and self.speculate in choices):
            raise ValueError(f"speculate: expected one of {', '.join(choices)}, got {self.speculate!r:.80}")
        for name in ("prefix_cache", "claims_kv"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.cache_dir is not None and not (isinstance(self.cache_dir, (str, os.PathLike)) and str(self.cache_dir)):
            raise ValueError(f"cache_dir: expected a folder or None, got {self.cache_dir!r}")
        if self.state_every % PAGE_TOKENS:
            raise ValueError(f"state_every: expected a multiple of {PAGE_TOKENS}, got {self.state_every}")

    @property
    def num_slots(self) -> int:
        """The most requests of one step, those included that another engine began."""
        return self.max_requests + self.spare_requests

    @property
    def num_drafts(self) -> int:
        """The most drafts of a request in a step; 0 without speculative decoding."""
        return 0 if self.speculate == "off" else self.draft or MOST_BY_ITSELF


DEFAULTS = EngineOptions()
