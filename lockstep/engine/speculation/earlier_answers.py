"""Answers of finished requests, from which later requests of the same cache salt draft."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.engine.speculation.lookup import Place, num_alike, tail_key, tail_keys

SIZES = (8, 4)  # tokens of the tails that are looked up, the longest first: shorter ones are in every text
KEPT_TOKENS = 1 << 16  # of all salts together: about 25 MB


@dataclass(eq=False, slots=True)
class Answer:
    """A text: the last tokens of a prompt, and the answer to it."""

    salt: str
    tokens: tuple[int, ...]


class EarlierAnswers:
    """Texts of finished requests, by salt and by their tails. The least recently found text makes room.

    most: tokens of all texts together.
    """

    def __init__(self, max_tokens: int = KEPT_TOKENS) -> None:
        self._most, self.num_tokens = max_tokens, 0
        self._answers: OrderedDict[Answer, None] = OrderedDict()  # the most recently found one is the last
        self._known: dict[tuple[str, tuple[int, ...]], Answer] = {}  # by salt and tokens
        # {salt: {key of a tail: (the newest answer that has it, the index of the token that follows it)}}
        self._after: dict[str, dict[int, tuple[Answer, int]]] = {}

    def add(self, salt: str, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Keeps an answer, as far as there is room, with as many tokens of its prompt as a tail has."""
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
        """The Place after the longest tail that an answer of this salt has: in the newest answer that has it."""
        after = self._after.get(salt)
        if after is None:
            return None
        for size in SIZES:
            entry = after.get(tail_key(tail, len(tail), size)) if len(tail) >= size else None
            if entry is not None:
                answer, at = entry
                self._answers.move_to_end(answer)
                return Place(answer.tokens, at, num_alike(answer.tokens, at, tail))
        return None
