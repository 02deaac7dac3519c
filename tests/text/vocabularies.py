"""Small tokenizers of both common kinds, as Hugging Face folders and as GGUF metadata."""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lockstep.weights import mapped

TEXT = [
    "The quick brown fox jumps over the lazy dog, 1234567 times. It's been they'll've done; I'M sure.",
    "def f(x):\n    return x + 1  # naïve café\n\n\nfor i in range(10):\n\tprint(i)\r\n",
    "日本語のテキスト、한국어 텍스트, Ελληνικά, हिन्दी, עברית 🙂👨‍👩‍👧",
    "   leading and trailing   spaces   ",
]
SPECIAL = ["<|end|>", "<|begin|>"]


def byte_level(pattern: str | None = None, size: int = 500, nfc: bool = False) -> Tokenizer:
    """A GPT-2 style tokenizer trained on TEXT; `pattern` splits words, None is GPT-2's own way."""
    return Tokenizer.from_str(_trained(pattern, size, nfc))


@functools.cache
def _trained(pattern: str | None, size: int, nfc: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    splits = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, shown])
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return tokenizer.to_str()


def byte_fallback() -> Tokenizer:
    """A SentencePiece style tokenizer: ▁ for spaces, byte tokens for characters not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=words, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and ran to the hat, then ate it"] * 9, trainer)
    state = json.loads(tokenizer.to_str())
    # Bytes are ordinary tokens in real vocabularies; the trainer can only make them special ones.
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def write_folder(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """The two tokenizer files of a Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gguf_metadata(tokenizer: Tokenizer, pre: str, **extra: object) -> dict[str, object]:
    """GGUF metadata of a byte-level tokenizer, as a conversion writes it."""
    state = mapped.parse_json_object(tokenizer.to_str().encode(), "tokenizer")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    added = {token["content"]: token["special"] for token in state["added_tokens"]}
    types = [(3 if added[token] else 4) if token in added else 1 for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    ggml = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    return {f"tokenizer.ggml.{key}": value for key, value in {**ggml, **extra}.items()}


def sentencepiece_metadata(tokenizer: Tokenizer, **extra: object) -> dict[str, object]:
    """GGUF metadata of a SentencePiece tokenizer, as a conversion writes it: tokens learnt later have lower scores.

    Learnt tokens are listed last one first, so that their order does not give their scores away.
    """
    learnt = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(
        learnt, key=lambda token: learnt[token] if learnt[token] < 259 else 259 + len(learnt) - learnt[token]
    )
    types = [
        2 if token == "<unk>" else 3 if token in ("<s>", "</s>") else 6 if token.startswith("<0x") else 1
        for token in tokens
    ]
    scores = [0.0 if kind != 1 else -float(learnt[token]) for token, kind in zip(tokens, types, strict=True)]
    ggml = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**ggml, **extra}.items()}


def words_metadata() -> dict[str, object]:
    """GGUF metadata of a SentencePiece tokenizer that knows a few whole words and every byte."""
    words = ["▁", *"thecasdfr():x", "▁the", "▁cat", "▁▁▁", "▁return"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ggml = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "scores": [-float(index) for index in range(len(tokens))],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in ggml.items()}
