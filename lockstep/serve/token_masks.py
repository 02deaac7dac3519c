"""Masks for vLLM's allowed_token_ids and bad_words, beside the mask of a grammar."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lockstep.serve.errors import check_most, wrong_field
from lockstep.serve.fields.prompts import check_ids, text_tokenizer
from lockstep.text.speculative_mask import SpeculativeMask

if TYPE_CHECKING:
    from lockstep.llm import LLM
from lockstep.serve.service import Service

Mask = SpeculativeMask | None


class TokenMask(SpeculativeMask):
    """A logits_mask (see SamplingParams) of the tokens that are allowed, not banned, and allowed by another mask.

    allowed: token ids, or None for all; banned: sequences of token ids, whose last token is not allowed after the
    tokens before it; other: a further mask, such as a grammar's; ends: the tokens that end an answer, which stay
    allowed where `other` allows them and no other token is left. A TokenMask has no state of its own, so that several
    samples may share it.
    """

    def __init__(
        self,
        vocab_size: int,
        allowed: Sequence[int] | None,
        banned: Sequence[Sequence[int]],
        other: Mask = None,
        ends: Sequence[int] = (),
    ) -> None:
        self._bits = np.zeros(-(-vocab_size // 32), np.uint32)
        self._set(self._bits, np.arange(vocab_size) if allowed is None else np.array(allowed, np.int64))
        self._clear(self._bits, [ids[0] for ids in banned if len(ids) == 1])
        self._banned_after = [(list(ids[:-1]), ids[-1]) for ids in banned if len(ids) > 1]
        self._longest = max((len(before) for before, _ in self._banned_after), default=0)
        self._other, self._ends = other, np.zeros_like(self._bits)
        self._set(self._ends, np.array(ends, np.int64))

    @staticmethod
    def _set(bits: np.ndarray, ids: np.ndarray) -> None:
        np.bitwise_or.at(bits, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))

    @staticmethod
    def _clear(bits: np.ndarray, ids: Sequence[int]) -> None:
        for each in ids:
            bits[each // 32] &= ~np.uint32(1 << each % 32)

    def __call__(self, output_ids: list[int]) -> np.ndarray:
        """uint32 [ceil(vocabulary / 32)] for the token after these."""
        return self._narrowed(output_ids, None if self._other is None else self._other(output_ids))

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray]:
        others = itertools.repeat(None) if self._other is None else self._other.masks(output_ids, drafts, first)
        for tail, found in zip(itertools.islice(self._tails(output_ids, drafts), first, None), others, strict=False):
            yield self._narrowed(tail, found)

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        found = [] if self._other is None else self._other.forced(output_ids, drafts)
        *_, tail = self._tails(output_ids, drafts)
        return found[: self._num_left_in(tail, found)]

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        most = len(drafts) if self._other is None else self._other.num_allowed(output_ids, drafts)
        return self._num_left_in(output_ids, drafts[:most])

    def _tails(self, output_ids: list[int], drafts: Sequence[int]) -> Iterator[list[int]]:
        """The last tokens of the output, as many as banned sequences need, and the same after each of the drafts."""
        tail = output_ids[-self._longest :] if self._longest else []
        return itertools.accumulate(drafts, lambda before, token: [*before, token], initial=tail)

    def _num_left_in(self, output_ids: list[int], tokens: Sequence[int]) -> int:
        """How many of the tokens, which follow the output, come before the first one that is not allowed."""
        for i, (tail, token) in enumerate(zip(self._tails(output_ids, tokens), tokens, strict=False)):
            if not int(self._narrowed(tail, None)[token // 32]) >> token % 32 & 1:
                return i
        return len(tokens)

    def _narrowed(self, tail: list[int], found: np.ndarray | None) -> np.ndarray:
        """The allowed tokens after a tail. found: the other mask's tokens there, or None for all."""
        banned = [last for before, last in self._banned_after if tail[-len(before) :] == before]
        if found is None and not banned:
            return self._bits
        if found is None:
            bits = self._bits.copy()
            self._clear(bits, banned)
            return bits
        found = np.asarray(found).view(np.uint32)
        bits = self._bits & found
        self._clear(bits, banned)
        return bits if bits.any() else found & self._ends


class UntilComplete(SpeculativeMask):
    """A logits_mask for a grammar with ignore_eos: the grammar's tokens without those that end an answer, unless no
    other token is allowed: the text is complete then, and the answer ends."""

    def __init__(self, other: SpeculativeMask, llm: "LLM") -> None:
        self._other = other
        self._ends = TokenMask(llm.vocab_size, sorted(llm.engine.eos_ids), [])([])

    def __call__(self, output_ids: list[int]) -> np.ndarray:
        """uint32 [ceil(vocabulary / 32)] for the token after these."""
        return self._without_ends(self._other(output_ids))

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray]:
        return map(self._without_ends, self._other.masks(output_ids, drafts, first))

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        return self._other.forced(output_ids, drafts)

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        return self._other.num_allowed(output_ids, drafts)

    def _without_ends(self, found: np.ndarray | None) -> np.ndarray:
        words = np.asarray(found).view(np.uint32)
        others = words & ~self._ends
        return others if others.any() else words


def narrowing_fields(fields) -> list[str]:
    """The names of a request's fields that can together forbid every token, for the error message: first those that
    forbid single tokens, then those that constrain the answer by a grammar."""
    forbidding = [
        name for name in ("allowed_token_ids", "bad_words", "suppress_tokens", "min_tokens") if getattr(fields, name)
    ]
    return forbidding + fields.format_fields + (["tools"] if getattr(fields, "tools", None) else [])


def combined_masks(service: Service, fields, grammar_masks: Sequence[Mask], covers_answer: bool) -> Sequence[Mask]:
    """Masks of grammars (None: no grammar) combined with allowed_token_ids and bad_words of SamplingFields.

    covers_answer: the grammars constrain whole answers; with ignore_eos, which is switched off in `fields`, an answer
    then ends where its grammar ends. ApiError 400. It tokenizes, which may take a while.
    """
    allowed, words, masks = fields.allowed_token_ids, fields.bad_words, list(grammar_masks)
    if allowed is not None or words:
        if allowed is not None:
            if not allowed:
                raise wrong_field("allowed_token_ids", "expected at least one token id, got none")
            allowed = check_ids(service, allowed, "allowed_token_ids")
        banned, ends = bad_sequences(service, words or []), sorted(service.eos_ids)
        masks = [TokenMask(service.vocab_size, allowed, banned, mask, ends) for mask in masks]
    if covers_answer and fields.ignore_eos:
        fields.ignore_eos = False
        masks = [mask and UntilComplete(mask, service.loaded) for mask in masks]
    return masks


def bad_sequences(service: Service, words: list[str]) -> list[list[int]]:
    """Token ids of words as vLLM has them: without a space before the word, and also with one where that gives as many
    tokens of which the first differs."""
    limits, sequences = service.limits, []
    check_most("bad_words", len(words), limits.max_logit_bias, "words")
    for word in words:
        if not word.strip() or len(word) > limits.max_stop_chars:
            raise wrong_field(
                "bad_words", f"expected words of 1 to {limits.max_stop_chars} characters, got {word[:80]!r}"
            )
        encode = text_tokenizer(service).encode
        plain = encode(word.lstrip(), add_special_tokens=False)
        spaced = encode(f" {word.lstrip()}", add_special_tokens=False)
        if not plain:
            raise wrong_field("bad_words", f"expected words that have tokens, got {word!r}")
        sequences.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            sequences.append(spaced)
    return sequences
