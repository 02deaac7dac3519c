"""What an answer shows beside its receipt, and where that is not what the receipt proves.

A receipt is proven by computing, an answer around it is only text: somebody may have changed its words, its scores or
the reason of its end. So they are compared with what the verification found.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import FALSE, Verdict

IsPrompt = Callable[[str], bool]


@dataclass(frozen=True)
class Shown:
    """What an answer shows of itself; None, and empty, for what it does not show.

    index: of the choice among all samples of all prompts. text: of /v1/completions, perhaps with the prompt before it.
    message: of a conversation, without thoughts and calls. finish_reason: in a receipt's words; stop_text: the stop
    string that ended it. logprobs: of its tokens, perhaps with None and those of the prompt before them. some_logprobs:
    of some of its tokens, in order. prompt_logprobs: for each token of the prompt {id: {"logprob"}}. has_more_logprobs:
    whether there are alternatives, too. is_end: whether it may be only the end of the answer, as of a stream that goes
    on from tokens.
    """

    index: int | None = None
    text: str | None = None
    message: str | None = None
    prompt_ids: list[int] | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_text: str | None = None
    logprobs: list[Any] | None = None
    some_logprobs: list[Any] | None = None
    prompt_logprobs: list[Any] | None = None
    has_more_logprobs: bool = False
    is_end: bool = False

    def output_ids(self, statement: Statement) -> list[int] | None:
        """The token ids that have to be those of the receipt; None where it may show fewer."""
        shows_all = self.token_ids is not None and len(self.token_ids) >= statement.answer.tokens
        may_show_fewer = self.is_end or (not self.token_ids and is_unseen(statement))
        return self.token_ids if shows_all or not may_show_fewer else None


def is_unseen(statement: Statement) -> bool:
    """Whether an answer may have been asked for without any token (max_tokens 0): one is generated, and not shown."""
    return statement.params.max_tokens == 1 and statement.answer.tokens == 1


def bits(value: Any) -> bytes | None:
    """A number as a float32; None for what is no number."""
    try:
        return None if isinstance(value, bool) else struct.pack("<f", value)
    except (struct.error, OverflowError):
        return None


class Comparison:
    """Compares what an answer shows with the true Verdict on its receipt.

    prompt_ids: of the prompt; is_prompt: whether a text is the prompt's. notes: what was not compared, or is not as
    usual, in words.
    """

    def __init__(
        self, shown: Shown, statement: Statement, verdict: Verdict, prompt_ids: Sequence[int], is_prompt: IsPrompt
    ) -> None:
        self._shown, self._statement, self._verdict = shown, statement, verdict
        self._prompt_ids, self._is_prompt = prompt_ids, is_prompt
        self.notes: list[str] = []

    def verdict(self) -> Verdict:
        """The Verdict, false where the answer shows something else than was found."""
        checks = (
            self._sample,
            self._tokens,
            self._text,
            self._ending,
            self._logprobs,
            self._some_logprobs,
            self._prompt_logprobs,
        )
        wrong = next((found for check in checks if (found := check()) is not None), None)
        if self._shown.has_more_logprobs:
            self.notes.append("of its log-probabilities the alternatives were not compared")
        return self._verdict if wrong is None else wrong

    def _false(self, what: str, claimed: Any, found: Any, reason: str, position: int | None = None) -> Verdict:
        made = dict(what=what, claimed=claimed, found=found, reason=reason, position=position)
        return replace(self._verdict, code=FALSE, **made)

    @property
    def _checks_of_logprobs(self) -> list[Callable[[], Verdict | None]]:
        return [self._logprobs, self._some_logprobs, self._prompt_logprobs]

    def _sample(self) -> Verdict | None:
        index, n, sample = self._shown.index, self._statement.params.n, self._statement.sample
        if index is None or index % n == sample:
            return None
        reason = f"the receipt is of sample {sample} of {n}, the choice is number {index % n}"
        return self._false("sample", index % n, sample, reason)

    def _tokens(self) -> Verdict | None:
        ids, own = self._shown.token_ids, self._statement.answer.ids
        if ids and own and len(ids) < len(own) and tuple(ids) != own[-len(ids) :]:
            return self._false("token", None, None, "the token ids that the answer shows are not its last ones")
        return None

    def _text(self) -> Verdict | None:
        text, found = self._shown.text, self._verdict.text
        if text is None:
            if self._shown.message != found:
                self.notes.append("the text around it was not compared with its tokens")
            return None
        if text == found or (text.endswith(found) and self._is_prompt(text.removesuffix(found))):
            return None
        if is_unseen(self._statement) and not self._shown.token_ids and (not text or self._is_prompt(text)):
            self.notes.append("the answer shows nothing of this token, as max_tokens 0 asks")
            return None
        if self._shown.is_end and found.endswith(text):
            self.notes.append(f"of its text only the last {len(text)} characters are there")
            return None
        return self._false("text", text, found, "the answer shows another text than its tokens have")

    def _ending(self) -> Verdict | None:
        shown, answer = self._shown, self._statement.answer
        is_unseen_end = shown.finish_reason == "length" and is_unseen(self._statement) and not shown.token_ids
        if shown.finish_reason not in (None, answer.finish_reason) and not (is_unseen_end and shown.text is not None):
            reason = f"the answer says that it ended by {shown.finish_reason}, the receipt by {answer.finish_reason}"
            return self._false("finish_reason", shown.finish_reason, answer.finish_reason, reason)
        if shown.stop_text not in (None, answer.stop_reason):
            reason = "the answer says that another text stopped it than the receipt does"
            return self._false("stop_reason", shown.stop_text, answer.stop_reason, reason)
        return None

    def _logprobs(self) -> Verdict | None:
        """The log-probabilities of the answer's tokens, and of those of the prompt before them."""
        values = self._shown.logprobs
        if values is None:
            return None
        known, prompt = self._verdict.logprobs, (None, *self._verdict.prompt_logprobs)
        shows_prompt = bool(values) and values[0] is None and self._shown.text is not None
        full = [*prompt, *known] if shows_prompt else [*known]
        if self._shown.is_end and not shows_prompt:
            full = full[max(0, len(full) - len(values)) :]
        elif is_unseen(self._statement) and len(values) == len(full) - 1:
            full = full[:-1]
        if len(values) != len(full):
            reason = f"the answer shows {len(values)} log-probabilities, its receipt has {len(full)}"
            return self._false("logprobs", len(values), len(full), reason)
        wrong = _first_difference(values, full)
        if wrong is None:
            return None
        place, claimed, found = wrong
        number = place - (len(prompt) if shows_prompt else 0) + (0 if shows_prompt else len(known) - len(full))
        return self._wrong_logprob(number, len(prompt), claimed, found)

    def _wrong_logprob(self, number: int, num_prompt: int, claimed: Any, found: Any) -> Verdict:
        """The Verdict of a log-probability that is another; number: of the token in the answer, below 0 in the prompt,
        which has num_prompt tokens."""
        is_answer = number >= 0
        place, whose = (number, "answer") if is_answer else (number + num_prompt, "prompt")
        what = "logprobs" if is_answer else "prompt logprobs"
        reason = f"token {place} of the {whose} has the log-probability {found}, the answer shows {claimed}"
        return self._false(what, claimed, found, reason, place)

    def _some_logprobs(self) -> Verdict | None:
        found = iter(map(bits, self._verdict.logprobs))
        for value in self._shown.some_logprobs or ():
            if bits(value) not in found:  # which goes on behind the one before
                return self._false("logprobs", value, None, f"no token there has the log-probability {value}")
        return None

    def _prompt_logprobs(self) -> Verdict | None:
        values, found = self._shown.prompt_logprobs, self._verdict.prompt_logprobs
        if values is None:
            return None
        if len(values) != len(found) + 1 or values[0] is not None:
            reason = (
                f"the answer shows log-probabilities of {len(values)} tokens of the prompt, not of {len(found) + 1}"
            )
            return self._false("prompt logprobs", len(values), len(found) + 1, reason)
        ids = zip(self._prompt_ids[1:], values[1:], strict=True)
        own = [each.get(str(token), {}) if isinstance(each, dict) else {} for token, each in ids]
        claimed = [each.get("logprob") if isinstance(each, dict) else None for each in own]
        wrong = _first_difference(claimed, found)
        return wrong and self._wrong_logprob(wrong[0] - len(found), len(found) + 1, *wrong[1:])


def _first_difference(claimed: Sequence[Any], found: Sequence[Any]) -> tuple[int, Any, Any] | None:
    """(place, claimed, found) of the first numbers that are not the same float32."""
    for place, (one, other) in enumerate(zip(claimed, found, strict=True)):
        if one is not other and (bits(one) is None or bits(one) != bits(other)):
            return place, one, other
    return None
