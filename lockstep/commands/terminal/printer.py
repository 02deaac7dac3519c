"""Prints an answer while it comes: its text to standard output, its thoughts to standard error."""

import sys

from lockstep.commands.terminal.output import has_colours, shown, write
from lockstep.text.tool_calls.events import Event, Parser, Reasoning

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
BEGIN, END = "(thinking)\n", "\n(end of the thoughts)\n\n"  # around thoughts that cannot be dimmed


class AnswerPrinter:
    """Prints one answer, piece by piece. `content` and `thoughts` are the text and the thoughts so far.

    Where standard error shows colours the thoughts are dimmed, elsewhere they stand between two lines that say so.
    parser: finds the thoughts in the answer.
    """

    def __init__(self, parser: Parser) -> None:
        self._parser, self._is_dimmed, self._is_thinking = parser, has_colours(sys.stderr), False
        self.content = self.thoughts = ""

    def push(self, text: str) -> None:
        """Prints what a piece of the answer's text completes."""
        self._print(self._parser.push(text))

    def finish(self, is_cut: bool = False) -> None:
        """Prints the rest, now that no text follows, and ends the line. is_cut: the answer reached its maximum
        length."""
        self._print(self._parser.finish(is_cut))
        if self._is_thinking:
            self._end_thoughts()
        else:
            write("\n")

    def _print(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Reasoning):
                self._print_thought(event.text)
            else:
                self._print_content(getattr(event, "text", ""))

    def _print_thought(self, text: str) -> None:
        if not self._is_thinking:
            self._is_thinking = True
            _write_error("" if self._is_dimmed else BEGIN)
        self.thoughts += text
        safe = shown(text, sys.stderr)
        _write_error(f"{DIM}{safe}{PLAIN}" if self._is_dimmed else safe)

    def _print_content(self, text: str) -> None:
        if self._is_thinking:
            self._end_thoughts()
        self.content += text
        write(text)

    def _end_thoughts(self) -> None:
        self._is_thinking = False
        _write_error("\n\n" if self._is_dimmed else END)


def _write_error(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
