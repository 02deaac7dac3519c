"""A tokenizers.Tokenizer from GGUF metadata.

Source: the tokenizer section of docs/gguf.md, the pre-tokenizer patterns of src/llama-vocab.cpp of llama.cpp
and of the models' own tokenizer.json.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

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
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")

# Each pattern in turn splits what the ones before it left.
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "default": DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mellum", "exaone4"), (GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "smaug-bpe", "dbrx"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (QWEN2,)),
    "qwen35": (QWEN35,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", GPT2)),
    "tekken": (TEKKEN,),
}
# Whole words in the vocabulary are taken as they are; these also begin a text with BOS unless told otherwise.
WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "tekken"}
NORMALIZED_TO_NFC = {"qwen2", "deepseek-r1-qwen", "qwen35"}

END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TOKENS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>",
)  # fmt: skip


def build_tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.

    Raises ValueError if there is none, it is broken, or its model or pre-tokenizer is not supported.
    """
    kind = _typed(metadata, "tokenizer.ggml.model", str, "no_vocab")
    if kind == "no_vocab":
        raise ValueError("the file has no tokenizer: text cannot be encoded, only token ids be passed to lockstep.LLM")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported, only gpt2 and llama")
    tokens = list(_array(metadata, "tokenizer.ggml.tokens"))
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), [NORMAL] * len(tokens))
    build = _byte_level_bpe if kind == "gpt2" else _sentencepiece_bpe
    try:
        tokenizer = build(metadata, tokens, types)
    except ValueError:
        raise
    except Exception as error:  # the library raises plain Exception for an inconsistent vocabulary
        raise ValueError(f"the tokenizer in the metadata is inconsistent ({error})") from None
    _add_special(tokenizer, tokens, types)
    _add_template(tokenizer, metadata, tokens)
    return tokenizer


def end_token_ids(metadata: Mapping[str, object], tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a generation: those the metadata names, and control tokens known to mean it."""
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    known = {tokenizer.token_to_id(token) for token in END_TOKENS} & special
    num_tokens = len(_array(metadata, "tokenizer.ggml.tokens"))
    named = {_token_id(metadata, f"tokenizer.ggml.{key}", num_tokens) for key in END_KEYS}
    return frozenset((known | named) - {None})


def _byte_level_bpe(metadata: Mapping[str, object], tokens: list[str], types: list[int]) -> Tokenizer:
    kind = _typed(metadata, "tokenizer.ggml.pre", str, "default")
    if kind not in PATTERNS:
        raise ValueError(f"tokenizer.ggml.pre {kind!r} is not supported, only {', '.join(PATTERNS)}")
    # A merge is two tokens with a space between; no token of this kind contains one.
    merges = [tuple(merge.split(" ", 1)) for merge in _array(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind in WHOLE_WORDS_FIRST))
    if kind in NORMALIZED_TO_NFC:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[kind]]
    bytes_shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_shown])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, object], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    unknown = tokens[_token_id(metadata, "tokenizer.ggml.unknown_token_id", len(tokens)) or 0]
    merges = _merges_by_score(vocabulary, scores, types)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if _typed(metadata, "tokenizer.ggml.add_space_prefix", bool, True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple]:
    """Merges in the order SentencePiece would do them: the best scored result first."""
    merges = []
    for token, index in vocabulary.items():
        if types[index] != NORMAL:
            continue
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges.extend((-scores[index], pair) for pair in known)
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    chosen = [(token, kind) for token, kind in zip(tokens, types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    added = [AddedToken(token, special=kind != USER_DEFINED, normalized=False) for token, kind in chosen if token]
    tokenizer.add_tokens(added)


def _add_template(tokenizer: Tokenizer, metadata: Mapping[str, object], tokens: list[str]) -> None:
    """Make encode add BOS and EOS if the metadata says so, or by default where the kind does."""
    pre = _typed(metadata, "tokenizer.ggml.pre", str, "")
    starts = pre in WHOLE_WORDS_FIRST or metadata["tokenizer.ggml.model"] == "llama"
    begin = _token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens))
    end = _token_id(metadata, "tokenizer.ggml.eos_token_id", len(tokens))
    begins = _typed(metadata, "tokenizer.ggml.add_bos_token", bool, starts) and begin is not None
    ends = _typed(metadata, "tokenizer.ggml.add_eos_token", bool, False) and end is not None
    if begins or ends:
        special = [(name, number) for name, number in (("bos", begin), ("eos", end)) if number is not None]
        single = f"{'bos ' if begins else ''}$A{' eos' if ends else ''}"
        tokenizer.post_processor = TemplateProcessing(single=single, pair=None, special_tokens=special)


def _array(metadata: Mapping[str, object], key: str) -> Sequence:
    value = metadata.get(key)
    if value is None or isinstance(value, (str, bytes, int, float)) or len(value) == 0:
        raise ValueError(f"{key} is missing or empty: this GGUF file has no usable tokenizer")
    return value


def _typed(metadata: Mapping[str, object], key: str, kind: type, default: object) -> object:
    value = default if metadata.get(key) is None else metadata[key]
    if not isinstance(value, kind):
        raise ValueError(f"{key} must be a {'string' if kind is str else 'bool'}, found {value!r:.80}")
    return value


def _numbers(metadata: Mapping[str, object], key: str, count: int, default: list | None = None) -> list:
    """An array of one number for each token."""
    if key not in metadata and default is not None:
        return default
    array = _array(metadata, key)
    values = array.tolist() if isinstance(array, np.ndarray) else list(array)
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{key} must be an array of numbers, found {values[0]!r:.80} in it")
    if len(values) != count:
        raise ValueError(f"{key} has {len(values)} entries for {count} tokens")
    return values


def _token_id(metadata: Mapping[str, object], key: str, num_tokens: int) -> int | None:
    value = metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < num_tokens):
        raise ValueError(f"{key} must be one of {num_tokens} token ids, found {value!r}")
    return value
