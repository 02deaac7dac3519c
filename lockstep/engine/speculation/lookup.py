"""Prompt lookup: guesses of the next tokens from texts, namely what followed the same last tokens before.

The texts are the request's own (its prompt and its answer), its prediction, and earlier answers (see
earlier_answers.py). The place where the most tokens equal the end of the own text gives the guess; among equal places
the own text's, then the prediction's.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lockstep.engine.speculation.earlier_answers import EarlierAnswers

SIZES = (4, 3, 2)  # tokens of the tails that are looked up in the own text, the longest first
SIZES_OF_PREDICTION = (8, *SIZES)
READ_AT_ONCE = 4096  # tokens of a prediction that one `find` reads
MOST_ALIKE = 16  # tokens before a place that are compared with the end of the own text
GRADES = (4, 6, MOST_ALIKE)  # numbers of equal tokens at which the next better kind of guess begins

Tokens = Sequence[int]


class Guess(NamedTuple):
    """Tokens that may come next. source: "lookup", "prediction", "earlier_answers", "mtp", ... num_alike: for a guess
    from a text, how many tokens before it equal the end of the own text; else 0."""

    tokens: list[int]
    source: str
    num_alike: int = 0

    @property
    def kind(self) -> str:
        """The guesses with which its acceptance is measured: the source, and for a text the grade of num_alike, since
        the more tokens are alike, the likelier the next one is right."""
        return f"{self.source} {bisect_right(GRADES, self.num_alike)}" if self.num_alike else self.source


class Place(NamedTuple):
    """A place in a text: tokens[at] may come next, since the `length` tokens before it equal the end of the own
    text."""

    tokens: Tokens
    at: int
    length: int


def tail_key(tokens: Tokens, end: int, size: int) -> int:
    """A hash of tokens end - size .. end. Where two tails have the same hash, the guess is worse, and nothing else."""
    return hash(tuple(tokens[end - size : end]))


def tail_keys(tokens: Tokens, size: int) -> Iterator[int]:
    """The keys of all tails of a size after which a token follows, in order: the first tail ends at `size`."""
    num_tails = max(0, len(tokens) - size)
    return map(hash, zip(*(tokens[i : i + num_tails] for i in range(size)), strict=True))


def own_keys(tokens: Tokens) -> Iterable[int]:
    """The keys of the last tokens, for each of SIZES that the text is long enough for. It is called for every token, so
    that the usual case is written out."""
    if len(tokens) >= SIZES[0]:
        a, b, c, d = tokens[-SIZES[0] :]
        return hash((a, b, c, d)), hash((b, c, d)), hash((c, d))
    return [tail_key(tokens, len(tokens), size) for size in SIZES if len(tokens) >= size]


def is_longer(place: Place | None, other: Place | None) -> bool:
    """Whether a place has more equal tokens before it than another."""
    return place is not None and place.length > (other.length if other else 0)


def num_alike(tokens: Tokens, at: int, tail: Tokens) -> int:
    """The length of the common suffix of tokens[:at] and `tail`, MOST_ALIKE at most."""
    most, count = min(at, len(tail), MOST_ALIKE), 0
    while count < most and tokens[at - 1 - count] == tail[-1 - count]:
        count += 1
    return count


class Prediction:
    """A text that a request's answer may resemble, by its tails. Its tokens do not change: several requests may share
    it.

    Each `find` reads one more part of it, so that no step waits long for a long prediction.
    """

    def __init__(self, token_ids: Tokens) -> None:
        self.tokens = list(token_ids)
        self._num_read = 0
        self._places: dict[int, list[int]] = {}  # {key of a tail: the indices of the tokens that follow it}

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, tail: list[int], start: int) -> int | None:
        """The index after the longest tail that the text has: the first index from `start` on, or else the last
        before."""
        self._read_on()
        for size in SIZES_OF_PREDICTION:
            places = self._places.get(tail_key(tail, len(tail), size)) if len(tail) >= size else None
            if places:
                return places[min(bisect_left(places, start), len(places) - 1)]
        return None

    def _read_on(self) -> None:
        """Reads the next part of the text."""
        first, end = self._num_read, min(len(self.tokens), self._num_read + READ_AT_ONCE)
        for size in SIZES_OF_PREDICTION if first < end else ():
            start = max(0, first - size)
            for at, key in enumerate(tail_keys(self.tokens[start:end], size), start + size):
                self._places.setdefault(key, []).append(at)
        self._num_read = end


class PredictionCursor:
    """The position of one request's answer in its prediction: it begins at the beginning, moves on while answer and
    prediction agree, is lost where they differ, and begins anew where the tail of the answer is found again."""

    def __init__(self, prediction: Prediction) -> None:
        self._prediction, self._at, self._is_whole = prediction, 0, True
        self._is_lost, self._passed = False, 0  # _passed: the end of the last part on which both agree

    def follow(self, token: int) -> None:
        """Takes in the answer's next token."""
        tokens = self._prediction.tokens
        if self._is_lost:
            return
        if self._at < len(tokens) and tokens[self._at] == token:
            self._at += 1
            self._passed = self._at
        else:
            self._is_lost, self._is_whole = True, False

    def find(self, tail: list[int], drafts: list[int]) -> Place | None:
        """The Place where the prediction goes on after a tail, whose last tokens are drafts."""
        tokens = self._prediction.tokens
        at = self._at + len(drafts)
        if not self._is_lost and at < len(tokens) and tokens[self._at : at] == drafts:
            return Place(tokens, at, MOST_ALIKE + 1 if self._is_whole else num_alike(tokens, at, tail))
        at = self._prediction.find(tail, self._passed)
        if at is None:
            return None
        if not drafts:
            self._at, self._is_lost, self._is_whole = at, False, False
        return Place(tokens, at, num_alike(tokens, at, tail))


class Lookup:
    """The texts from which one request drafts.

    num_prompt: tokens of its prompt. answers, salt: earlier answers, and the cache salt of those that it may use.
    """

    def __init__(
        self,
        num_prompt: int = 0,
        prediction: Prediction | None = None,
        answers: "EarlierAnswers | None" = None,
        salt: str = "",
    ) -> None:
        self._tokens: list[int] = []
        self._after: dict[int, int] = {}  # {key of a tail: the index of the token that followed it last}
        self._num_prompt, self._answers, self._salt = num_prompt, answers, salt
        self._cursor = None if prediction is None else PredictionCursor(prediction)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Tokens) -> None:
        """Takes in more of the request's own text; the first call must have its whole prompt."""
        if not self._tokens:  # all tails of a long prompt at once, which is faster
            token_ids, prompt = token_ids[self._num_prompt :], token_ids[: self._num_prompt]
            for size in SIZES:
                self._after.update(zip(tail_keys(prompt, size), range(size, len(prompt)), strict=True))
            self._tokens += prompt
        for token in token_ids:
            self._append(token)

    def _append(self, token: int) -> None:
        """Takes in the next token of the own text, which is not the first one."""
        tokens = self._tokens
        at = len(tokens)
        for key in own_keys(tokens):
            self._after[key] = at
        tokens.append(token)
        if self._cursor and at >= self._num_prompt:
            self._cursor.follow(token)

    def guess(self, most: int, drafts: Sequence[int] = ()) -> Guess:
        """Up to `most` tokens that may follow the own text and the drafts after it; none if no text has their last
        tokens.

        A guess that reaches the end of the own text goes on from its own beginning: a text that repeats itself may go
        on repeating.
        """
        drafts = list(drafts)
        tail = self._tokens[-MOST_ALIKE:] + drafts
        place, source = self._own(tail), "lookup"
        if self._cursor and is_longer(other := self._cursor.find(tail, drafts), place):
            place, source = other, "prediction"
        if self._answers and is_longer(other := self._answers.find(self._salt, tail), place):
            place, source = other, "earlier_answers"
        if place is None:
            return Guess([], source)
        tokens = list(place.tokens[place.at : place.at + most])
        if source == "lookup" and len(tokens) < most:
            tokens += drafts
            tokens = (tokens * -(-most // len(tokens)))[:most]
        return Guess(tokens, source, place.length)

    def _own(self, tail: list[int]) -> Place | None:
        """The latest Place in the own text after the longest tail that occurs earlier in it."""
        for key in own_keys(tail):
            at = self._after.get(key)
            if at is not None:
                return Place(self._tokens, at, num_alike(self._tokens, at, tail))
        return None
