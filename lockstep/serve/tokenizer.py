"""Text to token ids and back: a thin layer over the tokenizers library, with a streaming detokenizer."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from lockstep.models.config import end_ids
from lockstep.serve.chat_template import ChatTemplate
from lockstep.serve.decoder_rules import DecoderRules, rules_of
from lockstep.serve.gguf_tokenizer import build_tokenizer, end_token_ids
from lockstep.weights.mapped import read_json_object

MAX_TOKENIZER_BYTES = 256 << 20


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    `eos_ids` end a generation, `bos_id` is None where the tokenizer has none, `special_tokens` maps names such
    as "eos_token" to text, `chat_templates` holds templates by name ("default", sometimes "tool_use").
    """

    backend: tokenizers.Tokenizer
    eos_ids: frozenset[int]
    bos_id: int | None
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised.

        `add_special_tokens` adds what the model expects around a text, such as its beginning-of-sequence token;
        pass False for a rendered chat. Raises ValueError for lone surrogates, which are not text.
        """
        check_text(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids: exactly what a Detokenizer emits for them in total. Ids without a token are empty."""
        detokenizer = Detokenizer(self, skip_special_tokens)
        return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.finish()

    def render_chat(
        self,
        messages: Sequence[Mapping],
        tools: Sequence | None = None,
        add_generation_prompt: bool = True,
        **variables,
    ) -> str:
        """The prompt text for a conversation. Raises ValueError if the model has no chat template or refuses it."""
        return self.chat_template(tools is not None).render(
            messages, tools, add_generation_prompt, **{**self.special_tokens, **variables}
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping],
        tools: Sequence | None = None,
        add_generation_prompt: bool = True,
        **variables,
    ) -> list[int]:
        """Token ids of a conversation's prompt; the template itself writes the special tokens."""
        text = self.render_chat(messages, tools, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how to write a conversation."""
        return bool(self.chat_templates)

    def chat_template(self, with_tools: bool = False) -> ChatTemplate:
        """The compiled template for conversations with or without tools. Raises ValueError if there is none."""
        if not self.chat_templates:
            raise ValueError("this model has no chat template: it continues text, use generate or pass a template")
        wanted = "tool_use" if with_tools and "tool_use" in self.chat_templates else "default"
        name = wanted if wanted in self.chat_templates else next(iter(self.chat_templates))
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.chat_templates[name])
        return self._compiled[name]

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model may have more rows than that."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not text: skipped when decoding unless asked for."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text (at its start, a leading space may be dropped from them)."""
        known = self._bytes_of_id.get(token_id)
        if known is None:
            if not 0 <= token_id < 1 << 32:
                raise ValueError(f"a token id is a whole number from 0, got {token_id}")
            token = self.backend.id_to_token(token_id)
            known = self._bytes_of_id[token_id] = b"" if token is None else self.rules.token_bytes(token)
        return known

    @cached_property
    def rules(self) -> DecoderRules:
        """How tokens become text. Raises ValueError for a decoder that is not supported."""
        return rules_of(self.backend.decoder)

    @cached_property
    def _bytes_of_id(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _compiled(self) -> dict[str, ChatTemplate]:
        return {}


class Detokenizer:
    """Streaming decode: `push` returns the text that a token completes, never part of a character.

    What all pushes and the final `finish` return is, joined, Tokenizer.decode of all ids; bytes that are
    not UTF-8 become U+FFFD, one for each maximal part that could have begun a character (the tokenizers library
    does the same for byte-level vocabularies, and one per byte for those with byte fallback).
    The cost per token does not depend on how many came before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_left = tokenizer.rules.strip_left
        self._at_start = True

    def push(self, token_id: int) -> str:
        """Text completed by this token; empty while a character is incomplete or for a skipped token."""
        if token_id in self._skipped:
            return ""
        return self._strip(self._utf8.decode(self._bytes(token_id)))

    def finish(self) -> str:
        """The rest: U+FFFD for a character left incomplete, otherwise empty."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _bytes(self, token_id: int) -> bytes:
        added = self._tokenizer.token_bytes(token_id)
        dropped = self._tokenizer.rules.dropped_at_start
        if self._at_start and added:
            self._at_start = False
            return added.replace(dropped, b"") if dropped else added
        return added

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if not text.startswith(self._tokenizer.rules.strip_text):
                self._strip_left = 0
                break
            text, self._strip_left = text[1:], self._strip_left - 1
        return text


def check_text(text: str) -> None:
    """Raise ValueError if `text` has a lone surrogate: it has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"text must be valid Unicode, found a lone surrogate U+{code:04X} at {error.start}") from None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder: tokenizer.json and what tokenizer_config.json adds to it.

    Raises ValueError that names the file if it is missing, broken or inconsistent.
    """
    folder = Path(folder)
    backend = _read_backend(folder / "tokenizer.json")
    config = _optional_json(folder / "tokenizer_config.json")
    _add_missing_tokens(backend, config.get("added_tokens_decoder", {}), folder)
    special_tokens = _special_tokens(config)
    bos_token = special_tokens.get("bos_token")
    return Tokenizer(
        backend=backend,
        eos_ids=_eos_ids(folder, backend, special_tokens),
        bos_id=None if bos_token is None else backend.token_to_id(bos_token),
        special_tokens=special_tokens,
        chat_templates=_chat_templates(folder, config),
    )


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. Raises ValueError if there is none or its kind is not supported."""
    backend = build_tokenizer(metadata)
    names = {"bos_token": "tokenizer.ggml.bos_token_id", "eos_token": "tokenizer.ggml.eos_token_id"}
    tokens = {name: backend.id_to_token(metadata[key]) for name, key in names.items() if key in metadata}
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend=backend,
        eos_ids=end_token_ids(metadata, backend),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        special_tokens={name: token for name, token in tokens.items() if token is not None},
        chat_templates={"default": template} if isinstance(template, str) else {},
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, and other tokenizer files are not supported")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path}: larger than {MAX_TOKENIZER_BYTES} bytes")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises plain Exception for a file it cannot read
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
    # Some files carry the settings of their training runs, which would cut prompts off.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _optional_json(path: Path) -> dict:
    return read_json_object(path) if path.is_file() else {}


def _add_missing_tokens(backend: tokenizers.Tokenizer, entries: object, folder: Path) -> None:
    """Add tokens that only tokenizer_config.json knows, with the ids it gives them."""
    present = backend.get_added_tokens_decoder()
    for token_id, entry in _added_entries(entries, folder):
        if token_id in present:
            continue
        flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([tokenizers.AddedToken(entry["content"], **flags)])
        if backend.token_to_id(entry["content"]) != token_id:
            raise ValueError(f"{folder}: added token {entry['content']!r} cannot have id {token_id}")


def _added_entries(entries: object, folder: Path) -> list[tuple[int, Mapping]]:
    valid = isinstance(entries, dict) and all(
        key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
        for key, entry in entries.items()
    )
    if not valid:
        raise ValueError(f"{folder}: added_tokens_decoder must map token ids to objects with a content")
    return sorted(((int(key), entry) for key, entry in entries.items()), key=lambda pair: pair[0])


def _special_tokens(config: Mapping) -> dict[str, str]:
    """Names such as "eos_token" to their text, which the config gives as a string or an object."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> frozenset[int]:
    paths = [folder / name for name in ("generation_config.json", "config.json")]
    listed = next((ids for path in paths if (ids := end_ids(_optional_json(path), f"{path}:"))), ())
    named = backend.token_to_id(special_tokens.get("eos_token", ""))
    return frozenset(listed) | (frozenset() if named is None else {named})


def _utf8(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def _chat_templates(folder: Path, config: Mapping) -> dict[str, str]:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return {"default": _utf8(own_file)}
    template = config.get("chat_template")
    if isinstance(template, list):
        return {str(entry.get("name")): str(entry.get("template")) for entry in template if isinstance(entry, dict)}
    return {"default": template} if isinstance(template, str) else {}
