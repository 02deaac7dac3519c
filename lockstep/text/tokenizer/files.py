"""The vocabulary of a Hugging Face folder: from tokenizer.json, or else tekken.json, or else tokenizer.model."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tokenizers
from tokenizers.processors import TemplateProcessing

from lockstep.text.templates.mistral import mistral_template
from lockstep.text.tokenizer import sentencepiece, tekken
from lockstep.text.tokenizer.folder import MAX_TOKENIZER_BYTES, optional_json, read_backend
from lockstep.text.tokenizer.space_prefix import SpacePrefix
from lockstep.weights.mapped import read_json_object, refuse_pointer

HUGGING_FACE, TEKKEN, SENTENCEPIECE = "tokenizer.json", "tekken.json", "tokenizer.model"
VERSIONED = re.compile(r"tokenizer\.model\.v(\d+)(?:m\d+)?")  # as Mistral names its SentencePiece files
NATIVE = "params.json"  # beside the weights in Mistral's own form
# Of Mistral's SentencePiece vocabularies: a control token that came with a version. The first has none.
MARKS = {"[SYSTEM_PROMPT]": "v7", "[PREFIX]": "v3", "[INST]": "v2"}
T = TypeVar("T")


class Vocabulary(NamedTuple):
    """What a tokenizer's file says. named: {"bos_token": its text} and so on. chat_template: for a folder without one;
    None if none fits. space_prefix: see there; None for a tokenizer without it. added: entries of tokens that lie
    beside the file, as in added_tokens_decoder."""

    backend: tokenizers.Tokenizer
    named: Mapping[str, str] = {}
    chat_template: str | None = None
    space_prefix: SpacePrefix | None = None
    added: Mapping[str, Any] = {}


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer's file of a folder; None if there is none. Of versions of one file it is the newest."""
    versions = {path: VERSIONED.fullmatch(path.name) for path in folder.glob("tokenizer.model.v*")}
    known = sorted((int(match[1]), path) for path, match in versions.items() if match)
    paths = [folder / HUGGING_FACE, folder / TEKKEN, *(path for _, path in reversed(known)), folder / SENTENCEPIECE]
    return next(filter(Path.is_file, paths), None)


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a folder. config: its tokenizer_config.json.

    Raises ValueError that names the file if there is none, or it is too large, broken, inconsistent or not supported.
    """
    path = tokenizer_file(folder)
    if path is None:
        raise ValueError(
            f"{folder}: has no {HUGGING_FACE}, {TEKKEN} or {SENTENCEPIECE}; without one prompts must be token ids "
            "(lockstep.LLM)"
        )
    if path.name == HUGGING_FACE:
        return Vocabulary(read_backend(path))
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path}: larger than {MAX_TOKENIZER_BYTES} bytes")
    vocabulary = (_of_tekken if path.name == TEKKEN else _of_sentencepiece)(path, config)
    _add_ends(vocabulary, config)
    return vocabulary


def _of_tekken(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    content = read_json_object(path)
    found = _named(path, lambda: tekken.read_tekken(content))
    template = mistral_template(
        found.version, spaced=False, thinks={"[THINK]", "[/THINK]"} <= {*found.special}, efforts=found.efforts
    )
    return Vocabulary(_named(path, lambda: tekken.build_tokenizer(found)), found.named(), template)


def _of_sentencepiece(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    raw = path.read_bytes()
    refuse_pointer(path, raw)
    model = _named(path, lambda: sentencepiece.read_model(raw))
    backend = _named(path, lambda: sentencepiece.build_tokenizer(model))
    control = model.texts(sentencepiece.CONTROL)
    version = next((version for mark, version in MARKS.items() if mark in control), None)
    version = version or ("v1" if (path.parent / NATIVE).is_file() else "")
    added, after_marks = _added_tokens(path.parent, config), config.get("legacy") is True
    marks = (
        *model.texts(sentencepiece.UNKNOWN, sentencepiece.CONTROL),
        *(entry["content"] for entry in added.values()),
    )
    prefix = SpacePrefix(marks, after_marks) if model.adds_prefix else None
    template = mistral_template(version, spaced=prefix is not None and not after_marks)
    return Vocabulary(backend, model.named(), template, prefix, added)


def _named(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns; a ValueError gets the file's name."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _add_ends(vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
    """Make `encode` put BOS before a text, unless the config says otherwise, and EOS behind it, if it says so."""
    names = {"bos": config.get("add_bos_token") is not False, "eos": config.get("add_eos_token") is True}
    tokens = {name: vocabulary.named[f"{name}_token"] for name in names if f"{name}_token" in vocabulary.named}
    ids = [(name, vocabulary.backend.token_to_id(token)) for name, token in tokens.items()]
    begin, end = (name if wanted and name in tokens else "" for name, wanted in names.items())
    if begin or end:
        vocabulary.backend.post_processor = TemplateProcessing(
            single=f"{begin} $A {end}".strip(), pair=None, special_tokens=ids
        )


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of added_tokens.json, {token: id}, in the form of added_tokens_decoder."""
    given = optional_json(folder / "added_tokens.json")
    if not all(type(token_id) is int and token_id >= 0 for token_id in given.values()):
        raise ValueError(f"{folder / 'added_tokens.json'}: expected an id for each token")
    special = config.get("additional_special_tokens")
    marks = special if isinstance(special, list) else []
    return {str(number): {"content": token, "special": token in marks} for token, number in given.items()}
