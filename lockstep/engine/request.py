"""What a user asks for and what comes back."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    temperature 0 is greedy (the lowest id wins a tie). top_k 0, top_p 1 and min_p 0 keep every token. seed: the noise is a
    function of seed, position and token id only. stop: strings; the answer ends before the first of them. logprobs: how
    many alternatives to report for each token, None for none.
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

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, kind, low, high in BOUNDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise ValueError(f"{name}: expected a number from {low} to {high}, got {value!r}")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop: expected non-empty strings, got {self.stop!r}")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ValueError(f"logprobs: expected 0 to 20 or None, got {self.logprobs!r}")


BOUNDS = (("max_tokens", int, 1, 1 << 30), ("temperature", (int, float), 0, 1e4), ("top_k", int, 0, 1 << 30),
          ("top_p", (int, float), 1e-9, 1), ("min_p", (int, float), 0, 1), ("seed", int, -(1 << 63), (1 << 63) - 1))


@dataclass
class Request:
    """One sequence on its way: token ids known so far, and how many of them are in the cache."""

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each output token
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    finish_reason: str | None = None  # "stop" or "length"

    @property
    def num_tokens(self):
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_left(self):
        """Tokens that are known but not computed."""
        return self.num_tokens - self.num_computed

    @property
    def max_num_tokens(self):
        return len(self.prompt_ids) + self.params.max_tokens

    def token_ids(self, start, end):
        """Known tokens start .. end."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:] + self.output_ids[max(0, start - num_prompt):end - num_prompt]
