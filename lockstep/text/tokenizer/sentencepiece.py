"""Builds a tokenizers.Tokenizer from a tokenizer.model, the file of a SentencePiece vocabulary.

Source: src/sentencepiece_model.proto, src/normalizer.cc, src/bpe_model.cc and src/unigram_model.cc of
github.com/google/sentencepiece.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lockstep.text.tokenizer.decoder_rules import BYTE_TOKEN
from lockstep.text.tokenizer.merges import merges_of
from lockstep.text.tokenizer.protobuf import Message
from lockstep.text.tokenizer.space_prefix import SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces, also GGUF's
UNIGRAM, BPE = 1, 2

PIECE = {1: ("piece", "text"), 2: ("score", "float"), 3: ("type", "int")}
TRAINER = {
    3: ("model_type", "int"), 24: ("treat_whitespace_as_suffix", "bool"), 35: ("byte_fallback", "bool"),
    45: ("unk_piece", "text"), 46: ("bos_piece", "text"), 47: ("eos_piece", "text"), 48: ("pad_piece", "text"),
}  # fmt: skip
NORMALIZER = {
    1: ("name", "text"), 2: ("precompiled_charsmap", "bytes"), 3: ("add_dummy_prefix", "bool"),
    4: ("remove_extra_whitespaces", "bool"), 5: ("escape_whitespaces", "bool"),
}  # fmt: skip
NAMES = {"unk_piece": "<unk>", "bos_piece": "<s>", "eos_piece": "</s>", "pad_piece": "<pad>"}

MAX_PIECES = 1 << 21
MAX_PIECE_CHARS = 1024
log = logging.getLogger("lockstep.tokenizer")


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a tokenizer.model: each piece with its score and type. trainer, normalizer: fields of the two
    specs that are there, by name."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    trainer: Mapping[str, Any]
    normalizer: Mapping[str, Any]

    @property
    def adds_prefix(self) -> bool:
        """Whether a text is tokenized as if a space stood before it."""
        return self.normalizer.get("add_dummy_prefix", True)

    @property
    def removes_spaces(self) -> bool:
        """Whether spaces at a text's ends are dropped, and others joined to one."""
        return self.normalizer.get("remove_extra_whitespaces", True)

    def texts(self, *types: int) -> list[str]:
        """The pieces of these types."""
        return [piece for piece, type in zip(self.pieces, self.types, strict=True) if type in types]

    def named(self) -> dict[str, str]:
        """{"bos_token": its piece} and so on, of bos, eos, unk and pad, as far as they are pieces."""
        known = set(self.pieces)
        given = {f"{name.removesuffix('_piece')}_token": self.trainer.get(name, usual) for name, usual in NAMES.items()}
        return {name: piece for name, piece in given.items() if piece in known}


def read_model(raw: bytes) -> SentencePieceModel:
    """The model in the bytes of a tokenizer.model. ValueError names what is wrong with it."""
    message = Message(raw, "the model")
    rows = []
    for piece in message.messages(1, "piece"):
        if len(rows) == MAX_PIECES:
            raise ValueError(f"more than {MAX_PIECES} pieces")
        found = piece.values(PIECE)
        rows.append((found.get("piece", ""), found.get("score", 0.0), found.get("type", NORMAL)))
    trainer = message.only(2, "trainer_spec").values(TRAINER)
    normalizer = message.only(3, "normalizer_spec").values(NORMALIZER)
    denormalizer = message.only(5, "denormalizer_spec").values(NORMALIZER)
    pieces, scores, types = zip(*rows, strict=True) if rows else ((), (), ())
    model = SentencePieceModel(pieces, scores, types, trainer, normalizer)
    _check_pieces(model)
    _check_settings(model, denormalizer)
    return model


def _check_pieces(model: SentencePieceModel) -> None:
    for index, (piece, score, type) in enumerate(zip(model.pieces, model.scores, model.types, strict=True)):
        if not 0 < len(piece) <= MAX_PIECE_CHARS:
            raise ValueError(f"piece {index} has {len(piece)} characters, expected 1 to {MAX_PIECE_CHARS}")
        if not NORMAL <= type <= BYTE or (type == BYTE and not BYTE_TOKEN.fullmatch(piece)):
            raise ValueError(f"piece {index} {piece!r:.80}: type {type} is not known, or not that of such a piece")
        if not math.isfinite(score):
            raise ValueError(f"piece {index} {piece!r:.80}: its score is {score}")
    [(piece, times)] = Counter(model.pieces).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"piece {piece!r:.80} is there {times} times")
    if (unknown := len(model.texts(UNKNOWN))) != 1:
        raise ValueError(f"{unknown} of its {len(model.pieces)} pieces are of type unknown, expected 1")
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - {*model.texts(BYTE)}
    if model.trainer.get("byte_fallback", False) and missing:
        raise ValueError(f"byte_fallback without a piece for each byte: {min(missing)} is missing")


def _check_settings(model: SentencePieceModel, denormalizer: Mapping[str, Any]) -> None:
    model_type = model.trainer.get("model_type", UNIGRAM)
    wrong = {
        "model_type": None if model_type in (UNIGRAM, BPE) else f"{model_type}, only 1 (unigram) and 2 (BPE)",
        "treat_whitespace_as_suffix": "true" if model.trainer.get("treat_whitespace_as_suffix") else None,
        "escape_whitespaces": None if model.normalizer.get("escape_whitespaces", True) else "false",
        "normalization": _named_map(model.normalizer),
        "denormalization": _named_map(denormalizer),
        "an unused or user-defined piece of a unigram model": next(
            iter(model.texts(UNUSED, USER_DEFINED) if model_type == UNIGRAM else ()), None
        ),
    }
    for name, value in wrong.items():
        if value is not None:
            raise ValueError(f"{name}: {value!s:.80} is not supported")


def _named_map(normalizer: Mapping[str, Any]) -> str | None:
    """The name of a normalizer with a map of characters; None without such a map."""
    return normalizer.get("name", "of characters") if normalizer.get("precompiled_charsmap") else None


def build_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """The tokenizer of a model; the space before a text (`adds_prefix`) is left to `SpacePrefix`.

    Texts are tokenized as SentencePiece does, but that control pieces and <unk> written out in a text are recognised.
    ValueError for a model that is inconsistent.
    """
    is_bpe = model.trainer.get("model_type", UNIGRAM) == BPE
    try:
        tokenizer = Tokenizer(_bpe(model) if is_bpe else _unigram(model))
        tokenizer.normalizer = normalizers.Sequence(_normalizers(model))
    except ValueError:
        raise
    except Exception as error:  # the library raises plain Exception for an inconsistent vocabulary
        raise ValueError(f"it is inconsistent ({str(error).partition(chr(10))[0]})") from None
    if not is_bpe and model.texts(BYTE):
        # All pieces can match in the library's unigram model: a byte written out is taken apart.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=<0x[0-9A-Fa-f]{2})(?=>)"), "isolated")
    tokenizer.decoder = decoder(model.adds_prefix or model.removes_spaces)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in model.texts(UNKNOWN, CONTROL)])
    own = [piece for piece in model.texts(USER_DEFINED) if " " not in piece]  # a text to be matched has ▁ for spaces
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in own])
    return tokenizer


def decoder(strips_first_space: bool) -> decoders.Decoder:
    """From pieces to text: ▁ is a space, and pieces of bytes are bytes."""
    strip = [decoders.Strip(" ", 1, 0)] if strips_first_space else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def merges_by_score(scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of pieces {piece: score}, the best first. A pair with a character that is not in the vocabulary is
    left out."""
    merges = merges_of({piece: -score for piece, score in scores.items()})
    return [pair for pair in merges if pair[0] in vocabulary and pair[1] in vocabulary]


def _bpe(model: SentencePieceModel) -> models.BPE:
    vocabulary = {piece: index for index, piece in enumerate(model.pieces)}
    rows = zip(model.pieces, model.scores, model.types, strict=True)
    scores = {piece: score for piece, score, type in rows if type == NORMAL}
    _warn_of_equal_scores(scores)
    missing = {character for piece in scores for character in piece} - vocabulary.keys()
    if lost := [piece for piece in scores if len(piece) > 1 and not missing.isdisjoint(piece)]:
        log.warning("%d pieces, such as %r, have characters that are no pieces: they are not used", len(lost), lost[0])
    unknown, has_bytes = model.texts(UNKNOWN)[0], model.trainer.get("byte_fallback", False)
    merges = merges_by_score(scores, vocabulary)
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)


def _warn_of_equal_scores(scores: Mapping[str, float]) -> None:
    """A warning where pieces of equal scores may be joined in another order than SentencePiece does."""
    counts = Counter(scores.values())
    equal = [piece for piece, score in scores.items() if len(piece) > 1 and counts[score] > 1]
    if len(set("".join(equal))) > 1:  # see merges_of
        log.warning(
            "%d pieces, such as %r, have the scores of others: the longer is joined first, not the one to the left",
            len(equal),
            equal[0],
        )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    vocabulary = list(zip(model.pieces, model.scores, strict=True))
    has_bytes = model.trainer.get("byte_fallback", False)
    return models.Unigram(vocabulary, model.types.index(UNKNOWN), has_bytes)


def _normalizers(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    if not model.removes_spaces:
        return [normalizers.Replace(" ", SPACE)]
    after_prefix = rf"(?<=\A{SPACE}) +|" if model.adds_prefix else ""
    removed = Regex(rf"{after_prefix}\A +| +\z")
    at_end = Regex(rf"{SPACE}+\z")
    steps = [(removed, ""), (Regex(" {2,}"), " "), (" ", SPACE), (at_end, "")]
    return [normalizers.Replace(old, new) for old, new in steps]
