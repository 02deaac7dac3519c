"""Text to token ids and back: a thin layer over the tokenizers library, with a streaming detokenizer."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from lockstep.text.templates.chat_template import ChatTemplate, TemplateProcess
from lockstep.text.tokenizer import gguf as gguf_tokenizer
from lockstep.text.tokenizer.decoder_rules import DecoderRules, rules_of
from lockstep.text.tokenizer.end_mark import end_mark, with_call_ends
from lockstep.text.tokenizer.files import read_vocabulary, tokenizer_file
from lockstep.text.tokenizer.folder import (
    add_missing_tokens,
    chat_templates,
    eos_ids,
    optional_json,
    special_tokens,
    written,
)
from lockstep.text.tokenizer.space_prefix import SpacePrefix
from lockstep.weights.gguf.file import is_gguf

PIECE_CHARS = 1 << 16  # a long text is first tokenized in pieces of this length, to count its tokens
CUT_TOKENS = 64  # a cut between two pieces adds at most this many tokens to the count
CHARS_PER_TOKEN = 8  # a text with more characters than this for each allowed token counts as long
TOOL_TEMPLATE = "tool_use"  # the name of a model's second chat template, for conversations with tools


class TooManyTokens(ValueError):
    """A text has more tokens than `encode` was allowed to return."""


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    `backend` is the tokenizers library's object. `eos_ids` end a generation, `bos_id` is None where the tokenizer has
    none, `special_tokens` maps names such as "eos_token" to text, `chat_templates` holds templates by name ("default",
    sometimes TOOL_TEMPLATE), none of them empty. `only_decodes` is the reason why texts cannot be encoded, or None if
    they can. `space_prefix` puts SentencePiece's space before a text, where the backend does not. `template_process` is
    the worker process in which templates run, started with the first one.
    """

    backend: tokenizers.Tokenizer
    eos_ids: frozenset[int]
    bos_id: int | None
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    only_decodes: str | None = None
    space_prefix: SpacePrefix | None = None
    template_process: TemplateProcess = field(default_factory=TemplateProcess, repr=False, compare=False)
    # {name: compiled template, or the error message of one that cannot be compiled}
    compiled_templates: dict[str, ChatTemplate | str] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )
    _bytes_of_id: dict[int, bytes] = field(init=False, default_factory=dict, repr=False, compare=False)

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised.

        `add_special_tokens` adds the tokens that the model expects around a text, such as BOS (not a second one where
        the text begins with it); pass False for a rendered chat. `max_tokens`: a text with far more tokens is refused
        before all of it is tokenized, but one with a few more is not: check the length of the result. Raises
        TooManyTokens for such a text, ValueError for lone surrogates, which are not text, and where texts cannot be
        encoded. The library releases Python's global lock, so other threads run meanwhile.
        """
        check_text(text)
        if self.only_decodes is not None:
            raise ValueError(self.only_decodes)
        if max_tokens is not None and len(text) > max(PIECE_CHARS, CHARS_PER_TOKEN * max_tokens):
            self._check_length(text, max_tokens)
        ids = self.piece_ids(text, add_special_tokens)
        begins_twice = add_special_tokens and self.first_added is not None and ids[:2] == [self.first_added] * 2
        return ids[1:] if begins_twice else ids

    def piece_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text that is short enough for one call of the tokenizers library."""
        if self.space_prefix is not None:
            text = self.space_prefix.added_to(text)
        # The library's `encode` holds Python's global lock until it returns; its `encode_batch_fast` does not.
        try:
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        # the library raises plain Exception, and where its Rust code panics a PanicException, which is no Exception
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ValueError(f"the model's tokenizer cannot read this text ({error})") from None
            raise

    def _check_length(self, text: str, max_tokens: int) -> None:
        """Raise TooManyTokens as soon as the first pieces of a text have more than max_tokens tokens."""
        num_tokens = 0
        for begin in range(0, len(text), PIECE_CHARS):
            num_tokens += max(0, len(self.piece_ids(text[begin : begin + PIECE_CHARS], False)) - CUT_TOKENS)
            if num_tokens > max_tokens:
                first = min(begin + PIECE_CHARS, len(text))
                raise TooManyTokens(
                    f"the text has {len(text)} characters, of which the first {first} are more than "
                    f"the {max_tokens} tokens that it may have"
                )

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids: exactly what a Detokenizer emits for them in total. Ids without a token add nothing."""
        detokenizer = Detokenizer(self, skip_special_tokens)
        return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.finish()

    def render_chat(self, messages: Sequence[Mapping], tools: Sequence | None = None, **variables: object) -> str:
        """The prompt text of a conversation, see ChatTemplate.render. ValueError if the model has no chat template, or
        the template refuses the conversation."""
        template = self.chat_template(tools is not None)
        return template.render(messages, tools, **{**self.special_tokens, **variables})

    def encode_chat(self, messages: Sequence[Mapping], tools: Sequence | None = None, **variables: object) -> list[int]:
        """Token ids of a conversation's prompt. No special tokens are added: the template writes them itself."""
        return self.encode(self.render_chat(messages, tools, **variables), add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template, and a tokenizer that can encode what it renders."""
        return bool(self.chat_templates) and self.only_decodes is None

    def chat_template(self, with_tools: bool = False) -> ChatTemplate:
        """The compiled template for conversations with or without tools. ValueError if there is none, or it is not
        valid."""
        if not self.chat_templates:
            raise ValueError("this model has no chat template: it continues text, use generate or pass a template")
        preferred = TOOL_TEMPLATE if with_tools and TOOL_TEMPLATE in self.chat_templates else "default"
        name = preferred if preferred in self.chat_templates else next(iter(self.chat_templates))
        if name not in self.compiled_templates:
            try:
                self.compiled_templates[name] = ChatTemplate(self.chat_templates[name], self.template_process)
            except ValueError as error:  # remembered: compiling it again would fail again, and may take seconds
                self.compiled_templates[name] = str(error)
        compiled = self.compiled_templates[name]
        if isinstance(compiled, str):
            raise ValueError(compiled)
        return compiled

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding table may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def serialized(self) -> str:
        """All that the tokens of a text depend on."""
        return self.backend.to_str() + ("" if self.space_prefix is None else repr(self.space_prefix))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, such as marks of the chat format, which `skip_special_tokens` leaves out of a text."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text (as the first token of a text, it may lose its leading space)."""
        known = self._bytes_of_id.get(token_id)
        if known is None:
            if not 0 <= token_id < 1 << 32:
                raise ValueError(f"a token id is a whole number from 0, got {token_id}")
            token = self.backend.id_to_token(token_id)
            known = self._bytes_of_id[token_id] = b"" if token is None else self.rules.token_bytes(token)
        return known

    @cached_property
    def rules(self) -> DecoderRules:
        """The rules by which tokens become text. Raises ValueError for a decoder that is not supported."""
        return rules_of(self.backend.decoder)

    @cached_property
    def first_added(self) -> int | None:
        """The token that `encode` puts before every text (usually BOS), or None."""
        with_special, plain = (self.backend.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        return with_special[0] if with_special[:1] != plain[:1] else None


class Detokenizer:
    """Streaming decode: `push` returns the text that a token completes, never part of a character.

    The results of all pushes and of the final `finish`, joined, equal Tokenizer.decode of all ids. SentencePiece writes
    a space before the first word of a text, which is dropped here; with `begins_text` False the ids continue a text, so
    nothing is dropped. Bytes that are not UTF-8 become U+FFFD, one for each maximal part that could have begun a
    character (so does the tokenizers library for byte-level vocabularies; with byte fallback it writes one per byte).
    The cost per token does not depend on the length of the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, begins_text: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_left = tokenizer.rules.strip_left if begins_text else 0
        self.at_start = begins_text  # whether the next token is the first with bytes, which may lose its leading space

    def push(self, token_id: int) -> str:
        """Text completed by this token; empty while a character is incomplete or for a skipped token."""
        if token_id in self._skipped:
            return ""
        return self._strip(self.utf8.decode(self._bytes(token_id)))

    def finish(self) -> str:
        """The end of the text: U+FFFD if its last character is incomplete, otherwise empty."""
        return self._strip(self.utf8.decode(b"", final=True))

    def _bytes(self, token_id: int) -> bytes:
        added = self._tokenizer.token_bytes(token_id)
        dropped = self._tokenizer.rules.dropped_at_start
        if self.at_start and added:
            self.at_start = False
            return added.replace(dropped, b"") if dropped else added
        return added

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if not text.startswith(self._tokenizer.rules.strip_text):
                self._strip_left = 0
                break
            text, self._strip_left = text[1:], self._strip_left - 1
        return text


class AnswerParams(Protocol):
    """The fields of SamplingParams that matter for detokenizing an answer."""

    @property
    def skip_special_tokens(self) -> bool: ...
    @property
    def logits_mask(self) -> Any: ...


class Answering(Protocol):
    """The part of engine.request.Request that matters for detokenizing its answer."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def params(self) -> AnswerParams: ...


def answer_detokenizer(tokenizer: Tokenizer, request: Answering) -> Detokenizer:
    """The Detokenizer for a request's answer, which continues the text of its prompt.

    If the prompt has no text, such as one of BOS alone, the answer begins the text, and its first token may lose the
    leading space. Under a logits mask it keeps the space: grammars count every byte of a token.
    """
    params = request.params
    skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
    has_text = any(tokenizer.token_bytes(i) for i in request.prompt_ids if i not in skipped)
    return Detokenizer(tokenizer, params.skip_special_tokens, not has_text and params.logits_mask is None)


def check_can_encode(tokenizer: Tokenizer, name: str) -> None:
    """Raise ValueError unless the tokenizer of the model, called `name` in the message, turns texts into tokens."""
    if tokenizer.only_decodes is not None:
        raise ValueError(f"{name}: {tokenizer.only_decodes}")


def check_can_chat(tokenizer: Tokenizer, name: str) -> None:
    """Raise ValueError unless the model, called `name` in the message, has a usable chat template."""
    check_can_encode(tokenizer, name)
    if not tokenizer.chat_templates:
        raise ValueError(
            f"{name}: has no chat template, so it can only continue text (lockstep generate); pass a chat "
            f"model, such as Qwen/Qwen3-0.6B"
        )


def check_text(text: str) -> None:
    """Raise ValueError if `text` has a lone surrogate, which cannot be written in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"text must be valid Unicode, found a lone surrogate U+{code:04X} at {error.start}") from None


def find_tokenizer(path: Path, metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer of a checkpoint: from a GGUF file's metadata, or from the files in the folder `path` or, where
    `path` is a file, beside it.

    Raises ValueError if there is none, or it is broken or not supported.
    """
    folder = path if path.is_dir() else path.parent
    inside = gguf_tokenizer.has_tokenizer(metadata) or (is_gguf(path) and not _is_in(folder))
    if not inside:
        return load_tokenizer(folder)
    try:
        return tokenizer_from_gguf(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def has_tokenizer(path: Path, metadata: Mapping[str, object]) -> bool:
    """Whether the checkpoint has a tokenizer, broken or not, for `find_tokenizer` to read."""
    return gguf_tokenizer.has_tokenizer(metadata) or _is_in(path if path.is_dir() else path.parent)


def _is_in(folder: Path) -> bool:
    return tokenizer_file(folder) is not None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder: its vocabulary (see `read_vocabulary`), and the settings in the JSON
    files beside it.

    Raises ValueError that names the file if it is missing, broken or inconsistent.
    """
    folder = Path(folder)
    config = optional_json(folder / "tokenizer_config.json")
    vocabulary = read_vocabulary(folder, config)
    backend = vocabulary.backend
    entries = config.get("added_tokens_decoder", {})
    add_missing_tokens(backend, {**vocabulary.added, **entries} if isinstance(entries, dict) else entries, folder)
    by_file = [dict(vocabulary.named)]
    by_file += [special_tokens(given) for given in (optional_json(folder / "special_tokens_map.json"), config)]
    named = by_file[0] | by_file[1] | by_file[2]
    bos_token, built_in = named.get("bos_token"), vocabulary.chat_template
    return _with_end_mark(
        Tokenizer(
            backend=backend,
            eos_ids=eos_ids(folder, backend, [tokens["eos_token"] for tokens in by_file if "eos_token" in tokens]),
            bos_id=None if bos_token is None else backend.token_to_id(bos_token),
            special_tokens=named,
            chat_templates=chat_templates(folder, config) or ({"default": built_in} if built_in else {}),
            space_prefix=vocabulary.space_prefix,
        )
    )


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. Raises ValueError if there is none or its kind is not supported.

    A tokenizer with an unknown pre-tokenizer can only decode: its `encode` raises ValueError.
    """
    backend, ids = gguf_tokenizer.build_tokenizer(metadata), gguf_tokenizer.named_ids(metadata)
    tokens = {f"{name}_token": backend.id_to_token(token_id) for name, token_id in ids.items()}
    return _with_end_mark(
        Tokenizer(
            backend=backend,
            eos_ids=gguf_tokenizer.end_token_ids(metadata, backend),
            bos_id=ids.get("bos"),
            special_tokens={name: token for name, token in tokens.items() if token is not None},
            chat_templates=_templates_of_gguf(metadata),
            only_decodes=gguf_tokenizer.unknown_pre_tokenizer(metadata),
        )
    )


def _with_end_mark(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer whose `eos_ids` also has the tokens that end a turn of its chat template, or calls."""
    mark = end_mark(tokenizer)
    marked = tokenizer if mark is None else replace(tokenizer, eos_ids=tokenizer.eos_ids | {mark})
    changed = replace(marked, eos_ids=with_call_ends(marked))
    changed.compiled_templates.update(tokenizer.compiled_templates)
    return changed


def _templates_of_gguf(metadata: Mapping[str, object]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): value for name, value in metadata.items() if name.startswith(f"{key}.")}
    return written({"default": metadata.get(key), **named})
