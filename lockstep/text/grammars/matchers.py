"""llguidance's matchers: what a grammar allows next. The only file that calls for one, and bounds its work."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import llguidance
from llguidance import TokenizerWrapper

Tokenize = Callable[[str], Sequence[int]]
MAX_GRAMMAR_BYTES = 256 << 10
STACK_BYTES = 256 << 20  # llguidance follows references by recursion: a chain as long as a schema may be takes 100 MB
LIMITS: dict[str, Any] = dict(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=250_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
GIVEN = "given"  # the name of a Lark grammar that a user wrote
# Where llguidance found a mistake: a place in the grammar, lines of it, and a place in its own source.
PLACE, LINES, SOURCE = r"(at )?\d+\(\d+\): ", r"\n +(\d+ \||\^).*", r"\S*\.rs:\d+(:\d+)?:?"


@dataclass
class Vocabulary:
    """Tokens with the attributes that llguidance reads. tokens: their bytes; tokenize: a text's token ids, or none."""

    is_tokenizer_wrapper: ClassVar = True

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None
    tokenize: Tokenize

    def __call__(self, text: str) -> Sequence[int]:
        return self.tokenize(text)


def new_reader(vocabulary: Vocabulary, size: int, eos_ids: list[int]) -> llguidance.LLTokenizer:
    """llguidance's form of a vocabulary: half a second for 150 000 tokens."""
    return llguidance.LLTokenizer(cast(TokenizerWrapper, vocabulary), size, eos_ids)


def new_matcher(reader: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A compiled grammar at its beginning. ValueError for one that is wrong or too large."""
    matcher = llguidance.LLMatcher(reader, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    check(matcher, f'"name": "{GIVEN}"' in grammar)
    return matcher


def check(matcher: llguidance.LLMatcher, shows_lines: bool = False) -> None:
    """ValueError, with the reason, if a matcher cannot go on."""
    if matcher.is_error():
        raise ValueError(f"grammar: {readable(matcher.get_error(), shows_lines)[:500]}")


def readable(message: str, shows_lines: bool = False) -> str:
    """What llguidance says about a grammar, for the user who wrote it, or only what it was made of.

    shows_lines: its lines are the user's own. What it says of its own source is of no use to either.
    """
    if "panic" in message:
        return "it cannot be compiled, or is too large to be followed"
    message = re.sub(SOURCE, "", message.replace("<non-verbose/>", ""))
    return (message if shows_lines else re.sub(PLACE, "", re.sub(LINES, "", message))).strip()
