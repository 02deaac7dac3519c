"""`Completion`: the result of a generation, and `Stream`: its text while it is generated."""

from dataclasses import dataclass, field

from lockstep.engine.request import Request


@dataclass
class Completion:
    """The answer to one prompt.

    text: without the prompt. token_ids, logprobs: the generated tokens and the natural logarithm of each one's
    probability. top_logprobs: for each generated token {token id: log-probability}, the most probable first, where
    SamplingParams.logprobs asks for them. prompt_logprobs, prompt_top_logprobs: the same for the prompt's tokens from
    the second on, where SamplingParams.prompt_logprobs asks for them. finish_reason: "stop", "length" (max_tokens, or
    the context is full) or "error". stop_reason: the token id or string that stopped the answer. error: what went
    wrong, in one sentence. others: the second and later samples, where SamplingParams.n is more than 1.
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
    """The Completion of a request that has ended. others: the further samples of the same prompt."""
    assert request.finish_reason is not None, "the request has not ended"
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


class Stream:
    """A request's text while it is generated: `text` is all of it so far, `new_text` what the last `advance` added.

    Text only grows: no character is taken back. The request itself, with its token ids, is `request`.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.text, self.new_text = request, "", ""

    def advance(self) -> None:
        """Updates `text` and `new_text` with what the engine has generated since the last call."""
        self.new_text = self.request.text[len(self.text) :]
        self.text += self.new_text
