"""Masks of single tokens: those that are allowed, and those that would complete a banned sequence; alone, or around the
mask of a grammar."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lockstep.text.speculative_mask import SpeculativeMask

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
        self.allowed, self.banned, self.other, self.ends = allowed, banned, other, ends
        self._bits = np.zeros(-(-vocab_size // 32), np.uint32)
        self._set(self._bits, np.arange(vocab_size) if allowed is None else np.array(allowed, np.int64))
        self._clear(self._bits, [ids[0] for ids in banned if len(ids) == 1])
        self._banned_after = [(list(ids[:-1]), ids[-1]) for ids in banned if len(ids) > 1]
        self._longest = max((len(before) for before, _ in self._banned_after), default=0)
        self._ends = np.zeros_like(self._bits)
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
        return self._narrowed(output_ids, None if self.other is None else self.other(output_ids))

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray]:
        others = itertools.repeat(None) if self.other is None else self.other.masks(output_ids, drafts, first)
        for tail, found in zip(itertools.islice(self._tails(output_ids, drafts), first, None), others, strict=False):
            yield self._narrowed(tail, found)

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        found = [] if self.other is None else self.other.forced(output_ids, drafts)
        *_, tail = self._tails(output_ids, drafts)
        return found[: self._num_left_in(tail, found)]

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        most = len(drafts) if self.other is None else self.other.num_allowed(output_ids, drafts)
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

    def __init__(self, other: SpeculativeMask, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self.other = other
        self._ends = TokenMask(vocab_size, sorted(eos_ids), [])([])

    def __call__(self, output_ids: list[int]) -> np.ndarray:
        """uint32 [ceil(vocabulary / 32)] for the token after these."""
        return self._without_ends(self.other(output_ids))

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray]:
        return map(self._without_ends, self.other.masks(output_ids, drafts, first))

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        return self.other.forced(output_ids, drafts)

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        return self.other.num_allowed(output_ids, drafts)

    def _without_ends(self, found: np.ndarray | None) -> np.ndarray:
        words = np.asarray(found).view(np.uint32)
        others = words & ~self._ends
        return others if others.any() else words
