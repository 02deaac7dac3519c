"""One answer of a conversation, as it ended, and what is to be said about it."""

from dataclasses import dataclass

from lockstep.commands.terminal.answer import Timing


@dataclass(frozen=True)
class Turn:
    """An answer that has ended. content: its text, without thoughts; had_thoughts: whether it had some. finish_reason,
    error: of its Request; "cancelled" where Ctrl-C interrupted it. most: in words, what limits its length."""

    content: str
    had_thoughts: bool
    timing: Timing
    finish_reason: str | None
    error: str | None
    most: str

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.finish_reason == "cancelled"

    @property
    def shortfall(self) -> str:
        """In words: what the answer lacks, because it was cut, or is empty; an empty text if it is complete."""
        is_cut = self.finish_reason == "length"
        if self.content:
            return f"the answer was cut: {self.most}" if is_cut else ""
        if self.had_thoughts:
            return (
                f"no answer came, the thoughts were cut: {self.most}" if is_cut else "no answer came after the thoughts"
            )
        return "the answer is empty"

    @property
    def remarks(self) -> list[str]:
        """What is said below the answer in a conversation."""
        lost = "" if self.content else "the question is not kept, /regenerate asks it again"
        if self.is_interrupted:
            return ["; ".join(filter(None, ["interrupted", lost]))]
        if self.error is not None:
            return [self.error]
        shortfall = "; ".join(filter(None, [self.shortfall, lost]))
        return [*filter(None, [shortfall]), str(self.timing)]
