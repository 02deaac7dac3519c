"""The text of an answer while it is generated: tokens are detokenized up to the first stop sequence."""

from typing import TYPE_CHECKING, Protocol

from lockstep.text.stop_strings import StopStrings

if TYPE_CHECKING:
    from lockstep.engine.request import SamplingParams


class Detokenizer(Protocol):
    """Turns the tokens of one answer into characters."""

    def push(self, token_id: int, /) -> str:
        """Takes the next token; returns the characters that are complete with it."""
        ...

    def finish(self) -> str:
        """The characters of an unfinished tail, now that no token follows."""
        ...


class AnswerText:
    """Reads an answer token by token.

    `text` only grows: characters that may begin a stop sequence are held back until that is decided.
    """

    def __init__(self, detokenizer: Detokenizer, params: "SamplingParams") -> None:
        self.text, self._detokenizer, self._params, self._num_tokens = "", detokenizer, params, 0
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)

    def push(self, token: int, is_end: bool) -> str | None:
        """Takes the next token; returns the stop sequence that it completes, if any. is_end: whether the token itself
        ends the answer, so that it has no text unless include_stop_str_in_output is set."""
        self._num_tokens += 1
        if not is_end or self._params.include_stop_str_in_output:
            self._read(self._detokenizer.push(token))
        return self._stops.found

    def finish(self) -> None:
        """Adds the characters that were held back, now that no token follows."""
        if self._stops.found is None:
            self._read(self._detokenizer.finish())
            self.text += self._stops.finish()

    def _read(self, characters: str) -> None:
        self.text += self._stops.push(characters, self._num_tokens > self._params.min_tokens)
