"""Reads the tokenizer, the special tokens and the chat templates from the files of a Hugging Face folder."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from lockstep.models.config import end_ids
from lockstep.text.tokenizer.growth import check_growth
from lockstep.weights.mapped import read_json_object, refuse_pointer

MAX_TOKENIZER_BYTES = 256 << 20
ADDITIONAL_TEMPLATES = "additional_chat_templates"
log = logging.getLogger("lockstep.tokenizer")


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json, without truncation and padding.

    Raises ValueError if the file is too large or not readable, or its normalizers can make a text far longer.
    """
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path}: larger than {MAX_TOKENIZER_BYTES} bytes")
    text = _utf8(path)
    refuse_pointer(path, text[:100].encode())
    check_growth(text, path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for a file it cannot read
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
    # Some files have the truncation and padding of their training runs, which would cut prompts off.
    backend.no_truncation()
    backend.no_padding()
    return backend


def optional_json(path: Path) -> dict:
    """The JSON object in a file; empty if there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def add_missing_tokens(backend: tokenizers.Tokenizer, entries: object, folder: Path) -> None:
    """Add the tokens that only tokenizer_config.json has, with the ids it gives them."""
    present = backend.get_added_tokens_decoder()
    for token_id, entry in _added_entries(entries, folder):
        if token_id in present:
            continue
        size = backend.get_vocab_size(with_added_tokens=True)
        if token_id > size:
            log.warning(
                "%s: added token %r has id %d, and there are only %d tokens: it is ignored",
                folder,
                entry["content"],
                token_id,
                size,
            )
            continue
        flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([tokenizers.AddedToken(entry["content"], **flags)])
        if backend.token_to_id(entry["content"]) != token_id:
            raise ValueError(f"{folder}: added token {entry['content']!r} cannot have id {token_id}")


def _added_entries(entries: object, folder: Path) -> list[tuple[int, Mapping]]:
    if not isinstance(entries, dict) or not all(map(_is_added, entries.items())):
        raise ValueError(f"{folder}: added_tokens_decoder must map token ids to objects with a content")
    return sorted(((int(key), entry) for key, entry in entries.items()), key=lambda pair: pair[0])


def _is_added(item: tuple[str, Any]) -> bool:
    key, entry = item
    return key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)


def special_tokens(config: Mapping) -> dict[str, str]:
    """{name, such as "eos_token": text}, which the config gives as a string or an object."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def eos_ids(folder: Path, backend: tokenizers.Tokenizer, named: Iterable[str]) -> frozenset[int]:
    """Every id that ends a generation: the ids in generation_config.json and config.json, and those of the tokens whose
    texts are in `named`. A text that is no token is ignored, with a warning."""
    paths = [folder / name for name in ("generation_config.json", "config.json")]
    listed = {token_id for path in paths for token_id in end_ids(optional_json(path), f"{path}:")}
    id_of_text = {text: backend.token_to_id(text) for text in named}
    for text in (text for text, token_id in id_of_text.items() if text and token_id is None):
        log.warning("%s: eos_token %r is no token: it is ignored", folder, text)
    return frozenset(listed | {token_id for token_id in id_of_text.values() if token_id is not None})


def chat_templates(folder: Path, config: Mapping) -> dict[str, str]:
    """{name: template}: chat_template.jinja wins over tokenizer_config.json, which wins over chat_template.json."""
    additional = {path.stem: _utf8(path) for path in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))}
    places = (_own_file(folder), _listed(config), _listed(optional_json(folder / "chat_template.json")))
    return next(filter(None, places), {}) | written(additional)


def _own_file(folder: Path) -> dict[str, str]:
    path = folder / "chat_template.jinja"
    return written({"default": _utf8(path)}) if path.is_file() else {}


def _listed(config: Mapping) -> dict[str, str]:
    """The templates in a config: one, or a list of named ones."""
    template = config.get("chat_template")
    if not isinstance(template, list):
        return written({"default": template})
    return written({str(each.get("name")): each.get("template") for each in template if isinstance(each, dict)})


def _utf8(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def written(templates: Mapping[str, object]) -> dict[str, str]:
    """The templates that are text and not blank."""
    return {name: text for name, text in templates.items() if isinstance(text, str) and text.strip()}
