"""A bound on how much longer a tokenizer's normalizers and pre-tokenizers can make a text.

The tokenizers library does not bound it: a malicious file with a chain of replacements that each double a text would
fill the memory and end the process, while the file is read (added tokens are normalized, too) or with the first prompt.
"""

import base64
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

MAX_GROWTH = 64  # bytes that one byte may become; SentencePiece's usual chains make 2 to 44
MAX_STEPS = 64
MAX_PREPENDED_BYTES = 1024
SEQUENCES = ("normalizers", "pretokenizers")
MODEL = re.compile(r'"model"\s*:\s*\{')  # the vocabulary, which is nearly all of a file, and usually its end
ESCAPED = re.compile(r"\\u00[4-7]")  # an escaped letter, which could hide one of the names looked for


def check_growth(text: str, path: Path) -> None:
    """Raise ValueError naming the file if the tokenizer.json `text` can make texts far longer than they are."""
    try:
        content = _settings(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
    if not isinstance(content, dict):
        return
    steps = [*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))]
    if len(steps) > MAX_STEPS:
        raise ValueError(f"{path}: {len(steps)} normalizers and pre-tokenizers, at most {MAX_STEPS} are allowed")
    growth = 1
    for step in steps:
        growth *= _growth(step, path)
        if growth > MAX_GROWTH:
            raise ValueError(
                f"{path}: its normalizers and pre-tokenizers can make a text {growth} times as long, at "
                f"most {MAX_GROWTH} times is allowed"
            )


def _settings(text: str) -> object:
    """The parsed tokenizer.json, without its model (the vocabulary) if that can be cut off before parsing, which saves
    time and memory."""
    model = MODEL.search(text)
    rest = "" if model is None else text[model.start() :]
    if model is not None and not ('"normalizer"' in rest or '"pre_tokenizer"' in rest or ESCAPED.search(rest)):
        with contextlib.suppress(ValueError):
            return json.loads(f'{text[: model.start()]}"model":null}}', object_pairs_hook=_step)
    return json.loads(text, object_pairs_hook=_step)


def _step(pairs: list[tuple[str, object]]) -> dict:
    step = dict(pairs)
    if len(step) < len(pairs) and not step.keys().isdisjoint({"type", "pattern", *SEQUENCES}):
        raise ValueError(f"an object has a name twice, of {', '.join(step)}")
    return step


def _steps(found: object) -> Iterator[Mapping]:
    """The step itself, or, if it is a sequence, the steps in it."""
    if not isinstance(found, dict):
        return
    inner = [each for name in SEQUENCES if isinstance(found.get(name), list) for each in found[name]]
    if not inner:
        yield found
    for each in inner:
        yield from _steps(each)


def _growth(step: Mapping, path: Path) -> int:
    """The most bytes that a step can make of one byte. Unicode normalization counts as 1: in a chain it does not grow
    a text again.

    A step without a type is recognized by its fields, as the library does it.
    """
    if "pattern" in step and "content" in step:
        return _replaced(step)
    if "precompiled_charsmap" in step:
        return _longest_mapped(step, path)
    if len(str(step.get("prepend", "")).encode()) > MAX_PREPENDED_BYTES:
        raise ValueError(
            f"{path}: a normalizer prepends {len(str(step['prepend']))} characters to every text, at most "
            f"{MAX_PREPENDED_BYTES} bytes are allowed"
        )
    return 2 if step.get("type", "ByteLevel") == "ByteLevel" else 1


def _replaced(step: Mapping) -> int:
    content, pattern = str(step.get("content", "")).encode(), step.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    if not replaced or not isinstance(replaced, str):  # a regular expression may match an empty place
        return 1 + len(content)
    return max(1, -(-len(content) // len(replaced.encode())))


def _longest_mapped(step: Mapping, path: Path) -> int:
    """The growth by SentencePiece's precompiled_charsmap: the length of the longest text in it over 3 bytes, because
    the characters with long replacements have three bytes.

    Its layout: a table's size, the table, then the replacement texts, each ended by a zero byte.
    """
    try:
        raw = base64.b64decode(str(step.get("precompiled_charsmap") or ""), validate=True)
    except ValueError as error:
        raise ValueError(f"{path}: precompiled_charsmap is not base64 ({error})") from None
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(1, -(-max(map(len, texts.split(b"\0"))) // 3))
