"""Stop strings in text that comes in pieces, however it is cut into them."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string.

    The match that is complete first wins, and of those complete at the same character the longest: so the answer does
    not depend on where pieces end. found: the string that ended the text, None before that. include: whether it belongs
    to the text.
    """

    def __init__(self, strings: Sequence[str], include: bool = False) -> None:
        self.found, self._include, self._held = None, include, ""
        self._strings = [(s, borders(s)) for s in strings]
        self._matched = [0] * len(self._strings)  # how many characters of each string the text ends with

    def push(self, piece: str, may_stop: bool = True) -> str:
        """Takes a piece in; returns what is now certain to be part of the text, the rest is held back.

        may_stop: whether a match that this piece completes counts.
        """
        assert self.found is None, "text after its end"
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
        """The text held back, now that nothing follows."""
        rest, self._held = self._held, ""
        return rest

    def _read(self, character: str) -> list[str]:
        """The strings that are complete with this character."""
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
        """How many characters at the end of the text could begin string i, without being all of it."""
        (string, border), matched = self._strings[i], self._matched[i]
        return border[matched] if matched == len(string) else matched


def borders(string: str) -> list[int]:
    """For each n, the longest beginning of string[:n] that is also its end, but not all of it.

    Source: Knuth, Morris and Pratt 1977, "Fast pattern matching in strings".
    """
    made, matched = [0, 0], 0
    for n in range(1, len(string)):
        while matched and string[matched] != string[n]:
            matched = made[matched]
        matched += string[matched] == string[n]
        made.append(matched)
    return made
