"""Builds a tokenizers.Tokenizer from a tekken.json, the file of Mistral's byte-level vocabularies.

Ids are those of the special tokens, then those of the other tokens by rank. Of these a file may have more than are
used: default_vocab_size counts.
Source: src/mistral_common/tokens/tokenizers/tekken.py of github.com/mistralai/mistral-common, src/lib.rs of
github.com/openai/tiktoken.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from lockstep.text.tokenizer.decoder_rules import BYTE_OF_CHARACTER
from lockstep.text.tokenizer.merges import merges_of

VERSIONS = ("v1", "v2", "v3", "v7", "v11", "v13", "v15")
LISTED_FROM = "v11"  # files of earlier versions may not list their special tokens, which are then these
SETTINGS_FROM = "v15"  # files of this version say which settings the model may be told
EFFORT = re.compile("[a-z]{1,20}")
SPECIAL = """<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]
[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]
[TOOL_CONTENT]""".split()
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

MAX_TOKENS = 1 << 21
MAX_TOKEN_BYTES = 1024
MAX_PATTERN_CHARS = 1 << 14
CHARACTERS = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


@dataclass(frozen=True)
class Tekken:
    """The content of a tekken.json: the texts of the special tokens and the bytes of the others, each in the order of
    ids; the pattern that splits texts into words; the version of the chat format; the values of reasoning_effort that
    the model may be told, the usual one first."""

    special: Sequence[str]
    tokens: Sequence[bytes]
    pattern: str
    version: str
    efforts: Sequence[str] = ()

    def named(self) -> dict[str, str]:
        """{"bos_token": its text} and so on, of the tokens that are there."""
        return {name: text for name, text in NAMED.items() if text in self.special}


def read_tekken(content: Mapping[str, Any]) -> Tekken:
    """The content of a parsed tekken.json. ValueError names what is wrong with it."""
    config = content.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"config: expected an object, got {config!r:.80}")
    version, pattern = config.get("version"), config.get("pattern")
    if version not in VERSIONS:
        raise ValueError(f"config.version {version!r:.80} is not supported, only {', '.join(VERSIONS)}")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN_CHARS:
        raise ValueError(f"config.pattern: expected a text of 1 to {MAX_PATTERN_CHARS} characters, got {pattern!r:.80}")
    num_special = _size(config, "default_num_special_tokens", 0)
    vocab_size = _size(config, "default_vocab_size", num_special + 256)
    special = _special_tokens(content.get("special_tokens"), version, num_special)
    tokens = _tokens(content.get("vocab"), vocab_size - num_special)
    efforts = _efforts(content.get("model_settings_builder")) if version == SETTINGS_FROM else ()
    return Tekken(special, tokens, pattern, version, efforts)


def _efforts(builder: object) -> Sequence[str]:
    """The values of reasoning_effort, the usual one first, that a file's rules for the model's settings allow."""
    settings = {} if builder is None else builder
    rule = settings.get("reasoning_effort") if isinstance(settings, dict) else builder
    if rule is None:
        return ()
    values, usual = (rule.get(key) for key in ("values", "default")) if isinstance(rule, dict) else (None, None)
    texts = [text for text in values if isinstance(text, str)] if isinstance(values, list) else []
    if usual not in texts or texts != values or not all(map(EFFORT.fullmatch, texts)):
        raise ValueError(
            "model_settings_builder: reasoning_effort: expected values of small letters and a default among them, "
            f"got {rule!r:.80}"
        )
    return (usual, *(text for text in texts if text != usual))


def _size(config: Mapping[str, Any], key: str, low: int) -> int:
    value = config.get(key)
    if type(value) is not int or not low <= value <= MAX_TOKENS:
        raise ValueError(f"config.{key}: expected an integer from {low} to {MAX_TOKENS}, got {value!r:.80}")
    return value


def _special_tokens(listed: object, version: str, count: int) -> list[str]:
    """The special tokens; those that the file does not list are called by their number."""
    if listed is None and VERSIONS.index(version) < VERSIONS.index(LISTED_FROM):
        texts = [*map(str, SPECIAL)]
    else:
        texts = [_text(entry, index) for index, entry in enumerate(_list(listed, "special_tokens"))]
    if len(texts) > count:
        raise ValueError(f"special_tokens: {len(texts)} tokens, config.default_num_special_tokens is {count}")
    texts = [*texts, *(f"<SPECIAL_{number}>" for number in range(len(texts), count))]
    if len(set(texts)) < count:
        twice = next(text for index, text in enumerate(texts) if text in texts[:index])
        raise ValueError(f"special_tokens: {twice!r:.80} is there twice")
    return texts


def _text(entry: Any, index: int) -> str:
    _check_rank(entry, "special_tokens", index)
    text = entry.get("token_str")
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TOKEN_BYTES:
        raise ValueError(
            f"special_tokens {index}: token_str must be a text of 1 to {MAX_TOKEN_BYTES} characters, got {text!r:.80}"
        )
    return text


def _tokens(listed: object, count: int) -> list[bytes]:
    """The bytes of the first `count` tokens."""
    entries = _list(listed, "vocab")
    if len(entries) < count:
        raise ValueError(f"vocab: {len(entries)} tokens, config.default_vocab_size asks for {count}")
    tokens = [_bytes(entry, index) for index, entry in enumerate(entries[:count])]
    ranks: dict[bytes, int] = {}
    for index, token in enumerate(tokens):
        if ranks.setdefault(token, index) != index:
            raise ValueError(f"vocab: tokens {ranks[token]} and {index} are both {token!r:.80}")
    return tokens


def _bytes(entry: Any, index: int) -> bytes:
    _check_rank(entry, "vocab", index)
    given = entry.get("token_bytes")
    try:
        token = base64.b64decode(given, validate=True) if isinstance(given, str) else b""
    except (binascii.Error, ValueError):
        token = b""
    if not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise ValueError(
            f"vocab {index}: token_bytes must be 1 to {MAX_TOKEN_BYTES} bytes in base64, got {given!r:.80}"
        )
    if index < 256 and token != bytes([index]):
        raise ValueError(f"vocab {index}: expected byte {index}, as in all ranks below 256, got {token!r:.80}")
    return token


def _check_rank(entry: Any, where: str, index: int) -> None:
    rank = entry.get("rank") if isinstance(entry, dict) else None
    if type(rank) is not int or rank != index:
        raise ValueError(f"{where} {index}: expected an object of rank {index}, got {rank!r:.80}")


def _list(value: object, name: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {value!r:.80}")
    return value


def build_tokenizer(tekken: Tekken) -> Tokenizer:
    """The tokenizer, which recognises special tokens that are written out in a text. ValueError for one that cannot be
    built."""
    tokens = [token.decode("latin-1").translate(CHARACTERS) for token in tekken.tokens]
    merges = merges_of({token: rank for rank, token in enumerate(tokens)})
    if both := set(tokens).intersection(tekken.special):
        raise ValueError(f"vocab: {min(both)!r:.80} is a special token, too")
    vocabulary = {text: number for number, text in enumerate([*tekken.special, *tokens])}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
        split = pre_tokenizers.Split(Regex(tekken.pattern), "isolated")
    except Exception as error:  # the library raises plain Exception for a pattern it cannot read
        raise ValueError(f"it cannot be built ({str(error).partition(chr(10))[0]})") from None
    bytes_shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_shown])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tekken.special])
    return tokenizer
