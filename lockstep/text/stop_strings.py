"""Stop strings in streamed text: the result does not depend on how the text is cut into pieces."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string.

    The match that ends first wins, and among matches that end at the same character the longest. found: the stop string
    that ended the text, None before that. include: whether the stop string itself belongs to the text.
    """

    def __init__(self, strings: Sequence[str], include: bool = False) -> None:
        self.found, self._include, self._held = None, include, ""
        self._strings = [(s, borders(s)) for s in strings]
        self._matched = [0] * len(self._strings)  # for each string: its longest beginning that the text ends with

    def push(self, piece: str, may_stop: bool = True) -> str:
        """Adds a piece; returns the text that is now certain to come before any stop string. The rest is held back.

        may_stop: whether a match that this piece completes ends the text.
        """
        assert self.found is None, f"a piece of text after the stop string {self.found!r}"
        if not self._strings:
            return piece
        text, before = self._held + piece, len(self._held)
        for at, character in enumerate(piece, before + 1):
            ended = self._read(character)
            if ended and may_stop:
                self.found, self._held = max(ended, key=len), ""
                return text[:at] if self._include else text[: at - len(self.found)]
        keep = 0 if self._include else max(map(self._beginning, range(len(self._strings))), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        rest, self._held = self._held, ""
        return rest

    def _read(self, character: str) -> list[str]:
        """The stop strings that this character completes."""
        ended = []
        for i, (string, border) in enumerate(self._strings):
            matched = self._beginning(i)
            while matched and string[matched] != character:
                matched = border[matched]
            self._matched[i] = matched + (string[matched] == character)
            if self._matched[i] == len(string):
                ended.append(string)
        return ended

    def _beginning(self, i: int) -> int:
        """How many characters at the end of the text are a beginning of string i, but not all of it."""
        (string, border), matched = self._strings[i], self._matched[i]
        return border[matched] if matched == len(string) else matched


def borders(string: str) -> list[int]:
    """For each n from 0, the length of the longest proper prefix of string[:n] that is also its suffix.

    Source: Knuth, Morris and Pratt 1977, "Fast pattern matching in strings".
    """
    lengths, matched = [0, 0], 0
    for n in range(1, len(string)):
        while matched and string[matched] != string[n]:
            matched = lengths[matched]
        matched += string[matched] == string[n]
        lengths.append(matched)
    return lengths
