"""The space that SentencePiece puts before a text, so that its first word is the same token as within a text."""

import re
from dataclasses import dataclass

SPACE = "▁"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class SpacePrefix:
    """Puts a space before a text, unless a mark stands there. marks: texts of special tokens, which are no words.
    after_marks: a space goes before each text that follows a mark, too."""

    marks: tuple[str, ...]
    after_marks: bool = False

    def added_to(self, text: str) -> str:
        """The text with its space or spaces, written as ▁, which is no space that could be removed."""
        if not self.after_marks:
            return text if not text or text.startswith(self.marks) else SPACE + text
        # The longest of several marks that begin at one place is a token, so it has to be tried first.
        marks = sorted(filter(None, self.marks), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
        return "".join(SPACE + part if part and index % 2 == 0 else part for index, part in enumerate(parts))
