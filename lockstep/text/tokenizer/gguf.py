"""Builds a tokenizers.Tokenizer from GGUF metadata.

Source: the tokenizer section of docs/gguf.md, the pre-tokenizer patterns of src/llama-vocab.cpp of llama.cpp
and of the models' own tokenizer.json.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from lockstep.text.tokenizer.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    decoder,
    merges_by_score,
)
from lockstep.text.tokenizer.space_prefix import SPACE

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{PUNCTUATION_AND_SPACE}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{PUNCTUATION_AND_SPACE}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")

# {tokenizer.ggml.pre: patterns}. Each pattern splits the pieces that the pattern before it made.
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "default": DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mellum", "exaone4"), (GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "smaug-bpe", "dbrx"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (QWEN2,)),
    "qwen35": (QWEN35,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", GPT2)),
    "tekken": (TEKKEN,),
    "gpt-4o": (O200K,),
}
PRE_TOKENIZERS = {"gptoss": "gpt-4o"}  # by architecture: Ollama's own names none
# A whole word in the vocabulary is one token, without merges. These also add BOS unless the metadata says otherwise.
WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "tekken"}
NORMALIZED_TO_NFC = {"qwen2", "deepseek-r1-qwen", "qwen35"}

NO_TOKENIZER = ("no_vocab", "none")
T = TypeVar("T")
BUILT = ("gpt2", "llama", "gemma4")
IDS = dict(bos="bos_token_id", eos="eos_token_id", eot="eot_token_id", eom="eom_token_id", unk="unknown_token_id",
           pad="padding_token_id")  # fmt: skip
# Marks of chat formats, which no ordinary text has: they become control tokens, whatever type the file gives them.
END_MARKS = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
    "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<turn|>",
}  # fmt: skip
TURN_MARKS = {
    "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<start_of_turn>", "<|system|>",
    "<|user|>", "<|assistant|>", "<|turn>",
}  # fmt: skip
# These also occur in ordinary text, such as HTML, so they end an answer only if the file types them as control tokens.
END_WORDS = {"</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]"}
MARK = re.compile(r"<.+>|\[.+\]")
MAX_ENTRIES = {"tokenizer.ggml.tokens": 1 << 21, "tokenizer.ggml.merges": 1 << 22}
MAX_TOKEN_CHARS = 1024
STRANGE_ID = "tokenizer.ggml.%s %d is none of %d token ids: it is ignored"
log = logging.getLogger("lockstep.tokenizer")


def build_tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.

    Raises ValueError if the metadata has none, or a broken one, or its model is not supported. A tokenizer with an
    unknown pre-tokenizer (see `unknown_pre_tokenizer`) can only decode.
    """
    kind = _typed(metadata, "tokenizer.ggml.model", str, NO_TOKENIZER[0])
    if kind in NO_TOKENIZER:
        raise ValueError("the file has no tokenizer: text cannot be encoded, only token ids be passed to lockstep.LLM")
    if kind not in BUILT:
        raise ValueError(
            f"tokenizer.ggml.model {kind!r} is not supported, only {', '.join(BUILT)}: prompts must be token ids"
        )
    tokens = list(_array(metadata, "tokenizer.ggml.tokens"))
    if (longest := max(map(len, map(str, tokens)))) > MAX_TOKEN_CHARS:
        raise ValueError(
            f"tokenizer.ggml.tokens has a token of {longest} characters, at most {MAX_TOKEN_CHARS} are allowed"
        )
    _warn_of_strange_ids(metadata, len(tokens))
    types = _types(metadata, tokens)
    build = _byte_level_bpe if kind == "gpt2" else _sentencepiece_bpe
    try:
        tokenizer = build(metadata, tokens, types)
    except ValueError:
        raise
    except Exception as error:  # the library raises plain Exception for an inconsistent vocabulary
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the tokenizer in the metadata is inconsistent ({reason})") from None
    _add_special(tokenizer, tokens, types)
    _add_template(tokenizer, metadata, tokens)
    return tokenizer


def has_tokenizer(metadata: Mapping[str, object]) -> bool:
    """Whether a GGUF file's metadata has a tokenizer of a kind that can be built."""
    return _typed(metadata, "tokenizer.ggml.model", str, NO_TOKENIZER[0]) in BUILT


def unknown_pre_tokenizer(metadata: Mapping[str, object]) -> str | None:
    """The error message for encoding with a pre-tokenizer that is not in PATTERNS; None if it is known."""
    kind = _pre_tokenizer(metadata)
    if metadata["tokenizer.ggml.model"] != "gpt2" or kind in PATTERNS:
        return None
    return f"tokenizer.ggml.pre {kind!r} is not supported, only {', '.join(PATTERNS)}: prompts must be token ids"


def named_ids(metadata: Mapping[str, object]) -> dict[str, int]:
    """{name: id} of the tokens that the metadata names, of bos, eos, eot, eom, unk and pad.

    An id that no token has is left out: some conversions write 2^32 - 1 for none.
    """
    num_tokens = len(_array(metadata, "tokenizer.ggml.tokens"))
    given = {name: _integer(metadata, f"tokenizer.ggml.{key}") for name, key in IDS.items()}
    return {name: token_id for name, token_id in given.items() if token_id is not None and 0 <= token_id < num_tokens}


def end_token_ids(metadata: Mapping[str, object], tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a generation: the end tokens that the metadata names, and control tokens with a known end mark."""
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    known = special & {tokenizer.token_to_id(token) for token in END_MARKS | END_WORDS}
    ids = named_ids(metadata)
    listed = _listed_ends(metadata)
    return frozenset(known | listed | {ids[name] for name in ("eos", "eot", "eom") if name in ids})


def _byte_level_bpe(metadata: Mapping[str, object], tokens: list[str], types: list[int]) -> Tokenizer:
    kind, merges = _pre_tokenizer(metadata), _stated_merges(metadata)
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind in WHOLE_WORDS_FIRST))
    if kind in NORMALIZED_TO_NFC:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS.get(kind, ())]
    bytes_shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_shown])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _stated_merges(metadata: Mapping[str, object]) -> list[tuple[str, str]]:
    """The merges of a file that lists them: two tokens with a space between, which no token has in it."""
    merges = [merge.partition(" ") for merge in _array(metadata, "tokenizer.ggml.merges")]
    if single := [first for first, space, _ in merges if not space]:
        raise ValueError(f"tokenizer.ggml.merges: expected two tokens with a space between, got {single[0]!r:.80}")
    return [(first, second) for first, _, second in merges]


def _sentencepiece_bpe(metadata: Mapping[str, object], tokens: list[str], types: list[int]) -> Tokenizer:
    """BPE on text whose spaces are ▁, with bytes for characters without a token. Of Gemma 4 ("gemma4") files list the
    merges, of others ("llama") they follow from scores."""
    lists_merges = metadata["tokenizer.ggml.model"] == "gemma4"
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    unknown = tokens[named_ids(metadata).get("unk", 0)]
    if lists_merges:
        merges = _stated_merges(metadata)
    else:
        scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens))
        normal = {token: scores[index] for token, index in vocabulary.items() if types[index] == NORMAL}
        merges = merges_by_score(normal, vocabulary)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    has_prefix = _typed(metadata, "tokenizer.ggml.add_space_prefix", bool, not lists_merges)
    prefix = [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoder(has_prefix)
    return tokenizer


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    chosen = [
        (token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    added = [AddedToken(token, special=kind != USER_DEFINED, normalized=False) for token, kind in chosen if token]
    tokenizer.add_tokens(added)


def _add_template(tokenizer: Tokenizer, metadata: Mapping[str, object], tokens: list[str]) -> None:
    """Make `encode` add BOS and EOS if the metadata says so, or if this sort of tokenizer does by default."""
    kind = metadata["tokenizer.ggml.model"]
    starts = _pre_tokenizer(metadata) in WHOLE_WORDS_FIRST or kind in ("llama", "gemma4")
    begin, end = map(named_ids(metadata).get, ("bos", "eos"))
    begins = _typed(metadata, "tokenizer.ggml.add_bos_token", bool, starts) and begin is not None
    ends = _typed(metadata, "tokenizer.ggml.add_eos_token", bool, False) and end is not None
    if begins or ends:
        special = [(name, number) for name, number in (("bos", begin), ("eos", end)) if number is not None]
        single = f"{'bos ' if begins else ''}$A{' eos' if ends else ''}"
        tokenizer.post_processor = TemplateProcessing(single=single, pair=None, special_tokens=special)


def _pre_tokenizer(metadata: Mapping[str, object]) -> str:
    named = _typed(metadata, "tokenizer.ggml.pre", str, "default")
    return PRE_TOKENIZERS.get(str(metadata.get("general.architecture")), named)


def _warn_of_strange_ids(metadata: Mapping[str, object], num_tokens: int) -> None:
    known = named_ids(metadata)
    for name, key in IDS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None and name not in known:
            log.warning(STRANGE_ID, key, token_id, num_tokens)


def _types(metadata: Mapping[str, object], tokens: list[str]) -> list[int]:
    """The tokens' types. Marks of chat formats are control tokens, and so are BOS and end tokens that look like marks
    (`<...>` or `[...]`), though the file types them as normal or user-defined."""
    types = list(_numbers(metadata, "tokenizer.ggml.token_type", len(tokens), [NORMAL] * len(tokens)))
    named = [token_id for name, token_id in named_ids(metadata).items() if name in ("bos", "eos", "eot", "eom")]
    marks = [token_id for token_id in named if MARK.fullmatch(tokens[token_id])]
    marks += [index for index, token in enumerate(tokens) if token in END_MARKS or token in TURN_MARKS]
    for token_id in marks:
        types[token_id] = CONTROL if types[token_id] in (NORMAL, USER_DEFINED) else types[token_id]
    return types


def _listed_ends(metadata: Mapping[str, object]) -> set[int]:
    """The ids in Ollama's list of end tokens. An id that no token has is ignored, with a warning."""
    key = "tokenizer.ggml.eos_token_ids"
    listed = np.asarray(metadata.get(key, np.empty(0, np.int64)))
    if listed.dtype.kind not in "iu":
        raise ValueError(f"{key} must be an array of token ids, found {metadata[key]!r:.80}")
    num_tokens = len(_array(metadata, "tokenizer.ggml.tokens"))
    given = set(listed.ravel().tolist())
    known = {token_id for token_id in given if 0 <= token_id < num_tokens}
    for token_id in sorted(given - known):
        log.warning(STRANGE_ID, "eos_token_ids", token_id, num_tokens)
    return known


def _array(metadata: Mapping[str, object], key: str) -> Sequence | np.ndarray:
    value = metadata.get(key)
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)) or len(value) == 0:
        raise ValueError(f"{key} is missing or empty: this GGUF file has no usable tokenizer")
    if len(value) > MAX_ENTRIES.get(key, len(value)):
        raise ValueError(f"{key} has {len(value)} entries, at most {MAX_ENTRIES[key]} are allowed")
    return value


def _typed(metadata: Mapping[str, object], key: str, kind: type[T], default: T) -> T:
    value = default if metadata.get(key) is None else metadata[key]
    if not isinstance(value, kind):
        raise ValueError(f"{key} must be a {'string' if kind is str else 'bool'}, found {value!r:.80}")
    return value


def _numbers(metadata: Mapping[str, object], key: str, num_tokens: int, default: list | None = None) -> list:
    """An array with one number for each token."""
    if key not in metadata and default is not None:
        return default
    array = _array(metadata, key)
    values = array.tolist() if isinstance(array, np.ndarray) else list(array)
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{key} must be an array of numbers, found {values[0]!r:.80} in it")
    if len(values) != num_tokens:
        raise ValueError(f"{key} has {len(values)} entries for {num_tokens} tokens")
    return values


def _integer(metadata: Mapping[str, object], key: str) -> int | None:
    value = metadata.get(key)
    if value is not None and type(value) is not int:
        raise ValueError(f"{key} must be a token id, found {value!r:.80}")
    return value
