"""How much longer a tokenizer's normalizers and pre-tokenizers can make a text.

The tokenizers library makes room for all of it: a chain of replacements that each double a text would fill any memory,
and end the process, while the file is read (added tokens are normalized, too) or with the first prompt.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

MAX_GROWTH = 64  # bytes for one; SentencePiece's usual chains make 2 to 44
MAX_STEPS = 64
MAX_PREPENDED_BYTES = 1024
GROWING = ('"Replace"', '"Precompiled"', '"Prepend"')
FEW_BYTE_LEVELS = 4  # each can double a text


def check_growth(text: str, path: Path) -> None:
    """Raise ValueError naming the file if the tokenizer.json `text` can make texts far longer than they are."""
    if _says_none(text):
        return
    try:
        content = json.loads(text, object_pairs_hook=_step)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
    if not isinstance(content, dict):
        return
    steps = [*_steps(content.get("normalizer"), path), *_steps(content.get("pre_tokenizer"), path)]
    if len(steps) > MAX_STEPS:
        raise ValueError(f"{path}: {len(steps)} normalizers and pre-tokenizers, at most {MAX_STEPS} are allowed")
    growth = 1
    for step in steps:
        growth *= _growth(step, path)
        if growth > MAX_GROWTH:
            raise ValueError(f"{path}: its normalizers and pre-tokenizers can make a text {growth} times as long, at "
                             f"most {MAX_GROWTH} times is allowed")


def _says_none(text: str) -> bool:
    """Whether a text has no step that grows, told without parsing it: vocabularies have millions of characters."""
    is_plain = "\\u00" not in text  # the name of a step could be written with escapes
    return is_plain and text.count('"ByteLevel"') <= FEW_BYTE_LEVELS and not any(name in text for name in GROWING)


def _step(pairs: list[tuple[str, object]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs) and "type" in made:
        raise ValueError(f"an object of type {made['type']!r} has a name twice")
    return made


def _steps(found: object, path: Path) -> Iterator[Mapping]:
    """A step, or those of a sequence."""
    if not isinstance(found, dict):
        return
    inner = found.get("normalizers", found.get("pretokenizers")) if found.get("type") == "Sequence" else None
    if not isinstance(inner, list):
        yield found
        return
    for each in inner:
        yield from _steps(each, path)


def _growth(step: Mapping, path: Path) -> int:
    """How many bytes a step can make of one. Unicode's own forms count as one: they do not grow again in a chain."""
    kind = step.get("type")
    if kind == "Replace":
        return _replaced(step)
    if kind == "Precompiled":
        return _longest_mapped(step, path)
    if kind == "Prepend" and len(str(step.get("prepend")).encode()) > MAX_PREPENDED_BYTES:
        raise ValueError(f"{path}: a normalizer prepends {len(str(step['prepend']))} characters to every text, at most "
                         f"{MAX_PREPENDED_BYTES} bytes are allowed")
    return 2 if kind == "ByteLevel" else 1


def _replaced(step: Mapping) -> int:
    content, pattern = str(step.get("content", "")).encode(), step.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    if not replaced or not isinstance(replaced, str):  # a regular expression may match an empty place
        return 1 + len(content)
    return max(1, -(-len(content) // len(replaced.encode())))


def _longest_mapped(step: Mapping, path: Path) -> int:
    """SentencePiece's map: a table's size and the table, then the texts that it maps to, each ended by a zero byte.

    What becomes long are single characters of three bytes.
    """
    try:
        raw = base64.b64decode(str(step.get("precompiled_charsmap") or ""), validate=True)
    except ValueError as error:
        raise ValueError(f"{path}: precompiled_charsmap is not base64 ({error})") from None
    texts = raw[4 + int.from_bytes(raw[:4], "little"):]
    return max(1, -(-max(map(len, texts.split(b"\0"))) // 3))
