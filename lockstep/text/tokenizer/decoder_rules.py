"""Detokenizing: a decoder of the tokenizers library, reduced to rules that work one token at a time.

Source: tokenizers/src/decoders and tokenizers/src/pre_tokenizers of github.com/huggingface/tokenizers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers.decoders import Decoder

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class DecoderRules:
    """The rules by which tokens become bytes of text.

    For each token, in this order: `byte_level`: its characters stand for bytes as in GPT-2. `byte_fallback`: a token
    like <0x0A> is that byte. `replacements`: (old, new) pairs, applied to its text. At the start of the text:
    `strip_text` is dropped at most `strip_left` times, and `dropped_at_start` from the bytes of the first token.
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_text: str = " "
    strip_left: int = 0
    dropped_at_start: bytes = b""

    def token_bytes(self, token: str) -> bytes:
        """Bytes a token stands for anywhere but at the start of a text."""
        if self.byte_level:
            return byte_level_bytes(token)
        if self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")


def byte_level_bytes(token: str) -> bytes:
    """The bytes a GPT-2 style token stands for. A token with a character outside of that alphabet is its own UTF-8."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def rules_of(decoder: Decoder | None) -> DecoderRules:
    """The rules of a tokenizers decoder. Raises ValueError for a decoder that cannot work token by token."""
    if decoder is None:
        raise ValueError("this tokenizer has no decoder, so its tokens cannot be turned into text")
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        _require(set(kinds) <= {"ByteLevel", "Fuse"}, kinds)
        return DecoderRules(byte_level=True)
    if kinds == ["Metaspace"]:
        return _metaspace(steps[0])
    return _replacing(steps, kinds)


def _replacing(steps: Sequence[Mapping], kinds: Sequence[str]) -> DecoderRules:
    """The rules of a SentencePiece style decoder: Replace, ByteFallback, Fuse and, after Fuse, Strip at the left."""
    _require(set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}, kinds)
    strip = next((step for step in steps if step["type"] == "Strip"), {"content": " ", "start": 0, "stop": 0})
    replaced = [step for step in steps if step["type"] == "Replace"]
    _require(strip["stop"] == 0 and ("Strip" not in kinds or "Fuse" in kinds[: kinds.index("Strip")]), kinds)
    _require(all("String" in step["pattern"] for step in replaced), kinds)
    return DecoderRules(
        replacements=tuple((step["pattern"]["String"], step["content"]) for step in replaced),
        byte_fallback="ByteFallback" in kinds,
        strip_text=strip["content"],
        strip_left=strip["start"],
    )


def _metaspace(step: Mapping) -> DecoderRules:
    mark = step["replacement"]
    dropped = b"" if step["prepend_scheme"] == "never" else b" "
    return DecoderRules(replacements=((mark, " "),), dropped_at_start=dropped)


def _require(supported: bool, kinds: Sequence[str]) -> None:
    if not supported:
        raise ValueError(f"this tokenizer's decoder ({', '.join(kinds)}) is not supported")


def _byte_of_character() -> dict[str, int]:
    # GPT-2 shows printable Latin-1 bytes as themselves and the others, in order, from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()
