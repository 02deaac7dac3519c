"""Answers as `LLM` gives them."""

from dataclasses import dataclass, field

from lockstep.engine.request import Request


@dataclass
class Completion:
    """One answer: text, token ids, their log-probabilities (and alternatives, if asked for), and why it ended.

    finish_reason is "stop", "length" or "error"; stop_reason is the token id or string that stopped it, error what went
    wrong. prompt_logprobs begin with the prompt's second token. Alternatives are {token id: logprob}, best first.
    others: the samples after this one, where params asked for several.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_token_ids: list[int]
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)
    stop_reason: int | str | None = None
    error: str | None = None
    others: list["Completion"] = field(default_factory=list)

    @property
    def samples(self) -> list["Completion"]:
        """All samples of the prompt, this one first."""
        return [self, *self.others]


def completion(request: Request, *others: Request) -> Completion:
    """What an ended request was answered with, and those of other samples of its prompt."""
    assert request.finish_reason is not None, "it has ended"
    return Completion(
        text=request.text,
        token_ids=request.output_ids,
        logprobs=request.logprobs,
        finish_reason=request.finish_reason,
        prompt_token_ids=request.prompt_ids,
        top_logprobs=request.top_logprobs,
        prompt_logprobs=request.prompt_logprobs,
        prompt_top_logprobs=request.prompt_top_logprobs,
        stop_reason=request.stop_reason,
        error=request.error,
        others=[completion(other) for other in others],
    )
