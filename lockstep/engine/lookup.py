"""Guesses of the next tokens from the text itself: what followed the latest place that reads like its end."""

from collections.abc import Iterable

SIZES = (4, 3, 2)  # of the tails that are looked for, the longest first


class Lookup:
    """The text of one request, by its tails.

    A tail is known by its hash: where two are mistaken for each other, the guess is a worse one.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[int, int] = {}  # by the hash of a tail: where the token lies that followed it last

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Takes in more of the text."""
        for token in token_ids:
            at = len(self._tokens)
            for size in SIZES:
                if at >= size:
                    self._after[hash(tuple(self._tokens[at - size :]))] = at
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none if nothing in the text reads like its end.

        Where the guess reaches the end of the text, it goes on with itself: a text that repeats, repeats.
        """
        for size in SIZES:
            if len(self._tokens) > size and (at := self._after.get(hash(tuple(self._tokens[-size:])))) is not None:
                period = len(self._tokens) - at
                return [self._tokens[at + i % period] for i in range(most)]
        return []
