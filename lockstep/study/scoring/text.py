"""Texts of a study: files by path and SHA-256, cut into independent windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.text.tokenizer.tokenizer import Tokenizer

NO_TARGET = -1  # of a row that is not scored
SHINGLE = 32  # two texts may not share this many tokens in a row
MAX_EXCERPT = 60  # characters of a text in an error
LIKE = ("llama.cpp",)


@dataclass(frozen=True)
class Window:
    """Tokens that run as one sequence. targets: the token after each, NO_TARGET where a token is not scored."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """A text. sha256: of its file. ids: its tokens. first: the token with which the tokenizer begins texts, if any."""

    path: Path
    sha256: str
    num_bytes: int
    ids: Sequence[int]
    first: int | None = None


def read_text(path: Path, tokenizer: Tokenizer, sha256: str | None = None) -> Text:
    """Reads and tokenizes a file. ValueError if it is not UTF-8, is empty, or does not have the expected SHA-256;
    OSError if it cannot be read."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"{path}: its SHA-256 is {found}, expected {sha256}: it is another text")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8, expected a text file") from None
    ids = tokenizer.encode(text)
    if not text or not ids:
        raise ValueError(f"{path}: the text is empty")
    return Text(path, found, len(content), ids, tokenizer.first_added)


# ------------------------------------------------------------ windows


def windows_of(text: Text, length: int, num_windows: int | None = None, like: str | None = None) -> list[Window]:
    """Windows of `length` tokens of a text.

    num_windows: how many are taken, evenly spread over the text (with like: the first ones); None: all. The target of
    each token is the next token of the text; tokens after the last window are not used. like: "llama.cpp" cuts and
    scores as llama-perplexity does. ValueError if the text is too short.
    """
    least = 3 if like else 2  # tokens of a window in which one token is scored
    if length < least:
        raise ValueError(f"windows of {length} tokens, expected at least {least}")
    made = (_like_llama_cpp if like else _one_after_another)(text, length)
    if not made:
        raise ValueError(f"{text.path}: {len(text.ids)} tokens, expected more than {length} for one window of {length}")
    if num_windows is None:
        return made
    if not 1 <= num_windows <= len(made):
        raise ValueError(f"{text.path}: {num_windows} windows of {length} tokens wanted, it has {len(made)}")
    return made[:num_windows] if like else [made[i * len(made) // num_windows] for i in range(num_windows)]


def _one_after_another(text: Text, length: int) -> list[Window]:
    ids, starts = text.ids, range(0, len(text.ids) - length, length)
    return [Window(tuple(ids[i : i + length]), tuple(ids[i + 1 : i + length + 1])) for i in starts]


def _like_llama_cpp(text: Text, length: int) -> list[Window]:
    """Windows as llama-perplexity has them: the first token of each is replaced by the token that begins texts, if
    there is one; tokens from length / 2 to the last but one are scored, each with the next token of its own window."""
    made, first = [], length // 2
    for start in range(0, len(text.ids) - length + 1, length):
        ids = list(text.ids[start : start + length])
        targets = [NO_TARGET] * first + ids[first + 1 :] + [NO_TARGET]
        if text.first is not None:
            ids[0] = text.first
        made.append(Window(tuple(ids), tuple(targets)))
    return made


def windows_hash(windows: Sequence[Window]) -> str:
    """SHA-256 of the windows' tokens and targets, in hexadecimal."""
    return hashlib.sha256(repr([(w.ids, w.targets) for w in windows]).encode()).hexdigest()


# ------------------------------------------------------------ disjoint


def check_disjoint(calibration: Text, evaluation: Text, tokenizer: Tokenizer) -> None:
    """ValueError, with both places, if the texts share SHINGLE tokens in a row: a plan may not be fitted to the text
    that judges it."""
    found = shared_tokens(calibration.ids, evaluation.ids)
    if found is None:
        return
    a, b = found
    last = min(SHINGLE, len(calibration.ids), len(evaluation.ids)) - 1
    excerpt = tokenizer.decode(evaluation.ids[b : b + last + 1])[:MAX_EXCERPT]
    raise ValueError(
        f"{calibration.path}: its tokens {a} to {a + last} are tokens {b} to {b + last} of the "
        f"evaluation text {evaluation.path}, {excerpt!r}; expected texts that share no {SHINGLE} tokens in a row"
    )


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> tuple[int, int] | None:
    """The first place in b, as (place in a, place in b), where SHINGLE tokens in a row, or all of the shorter text, are
    in both; None if there is none."""
    size = min(SHINGLE, len(a), len(b))
    places = {tuple(a[i : i + size]): i for i in reversed(range(len(a) - size + 1))}
    shared = ((places.get(tuple(b[i : i + size])), i) for i in range(len(b) - size + 1))
    return next(((i, j) for i, j in shared if i is not None), None)
