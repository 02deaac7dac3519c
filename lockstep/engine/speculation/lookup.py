"""Guesses of the next tokens from texts: what followed a place that reads like the end of the request's own text.

Looked at are the request's own text (its prompt and its answer), its prediction, and earlier answers (see
earlier_answers.py). The place that agrees with the end of the own text for the most tokens gives the guess; among equal
ones the own text's, then the prediction's.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lockstep.engine.speculation.earlier_answers import EarlierAnswers

SIZES = (4, 3, 2)  # of the tails that are looked for in the own text, the longest first
SIZES_OF_PREDICTION = (8, *SIZES)
READ_AT_ONCE = 4096  # tokens of a prediction
MOST_ALIKE = 16  # tokens before a place that are compared with the end of the own text
GRADES = (4, 6, MOST_ALIKE)  # of them alike, from which guesses are judged by others of their like

Tokens = Sequence[int]


class Guess(NamedTuple):
    """Tokens that may come next, and where they come from: "lookup", "prediction", "earlier_answers", ...; from a text,
    how many tokens before them are alike."""

    tokens: list[int]
    source: str
    num_alike: int = 0

    @property
    def kind(self) -> str:
        """With which guesses it is judged: the more tokens are alike, the likelier the next one is."""
        return f"{self.source} {bisect_right(GRADES, self.num_alike)}" if self.num_alike else self.source


class Place(NamedTuple):
    """Where a text may go on: tokens[at] is what may come next, after `length` tokens that are alike."""

    tokens: Tokens
    at: int
    length: int


def tail_key(tokens: Tokens, end: int, size: int) -> int:
    """Stands for tokens end - size .. end. Where two tails are mistaken for each other, the guess is a worse one."""
    return hash(tuple(tokens[end - size : end]))


def tail_keys(tokens: Tokens, size: int) -> Iterator[int]:
    """The keys of all tails of a size that another token follows, in order: the first of them ends at `size`."""
    num_tails = max(0, len(tokens) - size)
    return map(hash, zip(*(tokens[i : i + num_tails] for i in range(size)), strict=True))


def own_keys(tokens: Tokens) -> Iterable[int]:
    """The keys of the tails of each of SIZES, as far as there are so many tokens. It is asked for with every token: the
    usual case is spelled out."""
    if len(tokens) >= SIZES[0]:
        a, b, c, d = tokens[-SIZES[0] :]
        return hash((a, b, c, d)), hash((b, c, d)), hash((c, d))
    return [tail_key(tokens, len(tokens), size) for size in SIZES if len(tokens) >= size]


def is_longer(place: Place | None, other: Place | None) -> bool:
    """Whether a place agrees for more tokens than another."""
    return place is not None and place.length > (other.length if other else 0)


def num_alike(tokens: Tokens, at: int, tail: Tokens) -> int:
    """How many of the tokens before a place are those at the end of `tail`, MOST_ALIKE at most."""
    most, found = min(at, len(tail), MOST_ALIKE), 0
    while found < most and tokens[at - 1 - found] == tail[-1 - found]:
        found += 1
    return found


class Prediction:
    """A text that a request's answer may be like, by its tails. It does not change: several requests may share it.

    It is read in parts, one with each `find`, so that nobody waits long for a long one.
    """

    def __init__(self, token_ids: Tokens) -> None:
        self.tokens = list(token_ids)
        self._num_read = 0
        self._places: dict[int, list[int]] = {}  # by the key of a tail: where the tokens lie that follow it

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, tail: list[int], start: int) -> int | None:
        """The place after the longest known tail: the first from `start` on, or else the last before it."""
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


class Follower:
    """Where the answer of one request is in its prediction: at its beginning, until they differ; then where the tail of
    the answer is found again, and from there on as long as they agree."""

    def __init__(self, prediction: Prediction) -> None:
        self._prediction, self._at, self._is_whole = prediction, 0, True
        self._is_lost, self._passed = False, 0  # the end of what they had in common last

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
        """Where the prediction goes on after a tail, whose last tokens are drafts."""
        tokens = self._prediction.tokens
        at = self._at + len(drafts)
        if not self._is_lost and at < len(tokens) and tokens[self._at : at] == drafts:
            return Place(tokens, at, MOST_ALIKE + 1 if self._is_whole else num_alike(tokens, at, tail))
        found = self._prediction.find(tail, self._passed)
        if found is None:
            return None
        if not drafts:
            self._at, self._is_lost, self._is_whole = found, False, False
        return Place(tokens, found, num_alike(tokens, found, tail))


class Lookup:
    """The texts that one request looks in.

    num_prompt: tokens of its text before its answer. answers, salt: earlier answers of those that share its cache salt.
    """

    def __init__(
        self,
        num_prompt: int = 0,
        prediction: Prediction | None = None,
        answers: "EarlierAnswers | None" = None,
        salt: str = "",
    ) -> None:
        self._tokens: list[int] = []
        self._after: dict[int, int] = {}  # by the key of a tail: where the token lies that followed it last
        self._num_prompt, self._answers, self._salt = num_prompt, answers, salt
        self._follower = None if prediction is None else Follower(prediction)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Tokens) -> None:
        """Takes in more of the request's own text, the first time at least its prompt."""
        if not self._tokens:  # a prompt may be long
            token_ids, prompt = token_ids[self._num_prompt :], token_ids[: self._num_prompt]
            for size in SIZES:
                self._after.update(zip(tail_keys(prompt, size), range(size, len(prompt)), strict=True))
            self._tokens += prompt
        for token in token_ids:
            self._append(token)

    def _append(self, token: int) -> None:
        """Takes in one token that is not the first of the prompt."""
        tokens = self._tokens
        at = len(tokens)
        for key in own_keys(tokens):
            self._after[key] = at
        tokens.append(token)
        if self._follower and at >= self._num_prompt:
            self._follower.follow(token)

    def guess(self, most: int, drafts: Sequence[int] = ()) -> Guess:
        """Up to `most` tokens that may follow the own text and drafts after it; none if no text reads like their end.

        Where the guess reaches the end of the own text, it goes on with itself: a text that repeats, repeats.
        """
        drafts = list(drafts)
        tail = self._tokens[-MOST_ALIKE:] + drafts
        place, source = self._own(tail), "lookup"
        if self._follower and is_longer(other := self._follower.find(tail, drafts), place):
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
        """The latest place in the own text after the longest tail that was there before."""
        for key in own_keys(tail):
            at = self._after.get(key)
            if at is not None:
                return Place(self._tokens, at, num_alike(self._tokens, at, tail))
        return None
