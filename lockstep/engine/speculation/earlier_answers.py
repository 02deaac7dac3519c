"""Answers that others got before, for guesses of what is answered next: only of requests with the same cache salt."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.engine.speculation.lookup import Place, num_alike, tail_key, tail_keys

SIZES = (8, 4)  # of the tails that are looked for, the longest first: shorter ones are in every text
KEPT_TOKENS = 1 << 16  # of all salts together: about 25 MB


@dataclass(eq=False, slots=True)
class Answer:
    """A text: the end of a prompt and what was answered."""

    salt: str
    tokens: tuple[int, ...]


class EarlierAnswers:
    """Texts of finished requests, by salt and by their tails. Those that were not found for the longest time go first.

    most: tokens of all of them together.
    """

    def __init__(self, most: int = KEPT_TOKENS) -> None:
        self._most, self.num_tokens = most, 0
        self._answers: OrderedDict[Answer, None] = OrderedDict()  # the one that was found last is the last
        self._known: dict[tuple[str, tuple[int, ...]], Answer] = {}
        # of a salt, by the key of a tail: the newest answer that has it, and where the token lies that follows it
        self._after: dict[str, dict[int, tuple[Answer, int]]] = {}

    def add(self, salt: str, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Keeps an answer, as far as there is room for it, with as much of its prompt as a tail has."""
        tokens = tuple(prompt_ids[-SIZES[0] :]) + tuple(output_ids[: self._most - SIZES[0]])
        known = self._known.get((salt, tokens))
        if known is not None:
            self._answers.move_to_end(known)
            return
        while self._answers and self.num_tokens + len(tokens) > self._most:
            self._drop(next(iter(self._answers)))
        answer = self._known[salt, tokens] = Answer(salt, tokens)
        self._answers[answer] = None
        self.num_tokens += len(tokens)
        after = self._after.setdefault(salt, {})
        for size in SIZES:
            places = ((answer, at) for at in range(size, len(tokens)))
            after.update(zip(tail_keys(tokens, size), places, strict=True))

    def _drop(self, answer: Answer) -> None:
        tokens, after = answer.tokens, self._after[answer.salt]
        del self._answers[answer], self._known[answer.salt, tokens]
        self.num_tokens -= len(tokens)
        for size in SIZES:
            for key in tail_keys(tokens, size):
                if key in after and after[key][0] is answer:
                    del after[key]
        if not after:
            del self._after[answer.salt]

    def find(self, salt: str, tail: Sequence[int]) -> Place | None:
        """The place after the longest known tail in the newest answer of a salt that has it."""
        after = self._after.get(salt)
        if after is None:
            return None
        for size in SIZES:
            found = after.get(tail_key(tail, len(tail), size)) if len(tail) >= size else None
            if found is not None:
                answer, at = found
                self._answers.move_to_end(answer)
                return Place(answer.tokens, at, num_alike(answer.tokens, at, tail))
        return None
