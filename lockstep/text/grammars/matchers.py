"""Makes llguidance's matchers, which compute the tokens that a grammar allows next, with limits on their work."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import llguidance
from llguidance import TokenizerWrapper

Tokenize = Callable[[str], Sequence[int]]
MAX_GRAMMAR_BYTES = 256 << 10
STACK_BYTES = 256 << 20  # llguidance follows references by recursion: the longest chain in a schema takes 100 MB
LIMITS: dict[str, Any] = dict(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=250_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
GIVEN = "given"  # the name of a Lark grammar that a user wrote
# Parts of llguidance's messages: a line and column of the grammar, quoted lines of it, and a place in its Rust source.
PLACE, LINES, SOURCE = r"(at )?\d+\(\d+\): ", r"\n +(\d+ \||\^).*", r"\S*\.rs:\d+(:\d+)?:?"


@dataclass
class Vocabulary:
    """A vocabulary with the attributes that llguidance reads.

    tokens: the bytes of each token id. tokenize: encodes a text to token ids; empty if it cannot be encoded exactly.
    """

    is_tokenizer_wrapper: ClassVar = True

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None
    tokenize: Tokenize

    def __call__(self, text: str) -> Sequence[int]:
        return self.tokenize(text)


def new_reader(vocabulary: Vocabulary, size: int, eos_ids: list[int]) -> llguidance.LLTokenizer:
    """llguidance's form of a vocabulary of `size` tokens. It takes half a second for 150 000 tokens."""
    return llguidance.LLTokenizer(cast(TokenizerWrapper, vocabulary), size, eos_ids)


def new_matcher(reader: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Compiles a grammar; returns a matcher at its beginning. ValueError if the grammar is wrong or too large."""
    matcher = llguidance.LLMatcher(reader, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    check(matcher, f'"name": "{GIVEN}"' in grammar)
    return matcher


def check(matcher: llguidance.LLMatcher, shows_lines: bool = False) -> None:
    """ValueError, with the reason, if a matcher is in an error state. shows_lines: see `readable`."""
    if matcher.is_error():
        raise ValueError(f"grammar: {readable(matcher.get_error(), shows_lines)[:500]}")


def readable(message: str, shows_lines: bool = False) -> str:
    """An error message of llguidance without the parts that a user cannot understand, such as places in its source.

    shows_lines: keep quoted lines of the grammar, because the user wrote it; a generated grammar is not shown.
    """
    if "panic" in message:
        return "it cannot be compiled, or is too large to be followed"
    message = re.sub(SOURCE, "", message.replace("<non-verbose/>", ""))
    return (message if shows_lines else re.sub(PLACE, "", re.sub(LINES, "", message))).strip()
