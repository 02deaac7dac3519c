"""What a verification finds."""

from dataclasses import dataclass

TRUE, FALSE, UNCHECKED = 0, 1, 2


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification, and the exit status of `lockstep verify`.

    code: 0: the receipt is true; 1: it is false; 2: it cannot be checked here. what: what is wrong ("token", "root",
    "finish_reason", "model", ...); "" where nothing is. position: of the first token that is wrong, counted from 0 in
    the answer (or in the prompt, where `what` says so); None where it is not known. claimed, found: the values. reason:
    the same in one sentence. Of a true one: text: of the answer, as its tokens and the tokenizer give it; logprobs: of
    its tokens; prompt_logprobs: of the prompt's tokens from the second on, where they were asked for.
    """

    code: int
    what: str = ""
    position: int | None = None
    claimed: object = None
    found: object = None
    reason: str = ""
    text: str = ""
    logprobs: tuple[float, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()

    @property
    def is_true(self) -> bool:
        """Whether the receipt is true."""
        return self.code == TRUE


def false(what: str, claimed: object, found: object, reason: str, position: int | None = None) -> Verdict:
    """The Verdict of a receipt that claims something else than what was found."""
    return Verdict(FALSE, what, position, claimed, found, reason)


def unchecked(what: str, reason: str, claimed: object = None, found: object = None) -> Verdict:
    """The Verdict of a receipt that cannot be checked here."""
    return Verdict(UNCHECKED, what, None, claimed, found, reason)
