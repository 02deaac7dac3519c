"""The text of an answer while it is generated: tokens turned into characters, up to a stop string."""

from typing import TYPE_CHECKING, Protocol

from lockstep.text.stop_strings import StopStrings

if TYPE_CHECKING:
    from lockstep.engine.request import SamplingParams


class Detokenizer(Protocol):
    """What turns an answer's tokens into characters."""

    def push(self, token_id: int, /) -> str:
        """The characters that a token completes."""
        ...

    def finish(self) -> str:
        """The rest."""
        ...


class AnswerText:
    """Reads an answer token by token.

    `text` only grows: what may begin a stop string is held back until it is certain.
    """

    def __init__(self, detokenizer: Detokenizer, params: "SamplingParams") -> None:
        self.text, self._detokenizer, self._params, self._num_tokens = "", detokenizer, params, 0
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)

    def push(self, token: int, is_end: bool) -> str | None:
        """Takes a token in; returns the stop string that it completes, if any. is_end: it is one that ends answers."""
        self._num_tokens += 1
        if not is_end or self._params.include_stop_str_in_output:
            self._read(self._detokenizer.push(token))
        return self._stops.found

    def finish(self) -> None:
        """Takes in what is left, now that no token follows."""
        if self._stops.found is None:
            self._read(self._detokenizer.finish())
            self.text += self._stops.finish()

    def _read(self, characters: str) -> None:
        self.text += self._stops.push(characters, self._num_tokens > self._params.min_tokens)
