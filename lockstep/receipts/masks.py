"""The masks of an answer whose tokens are known, computed before an engine's steps need them: a grammar may take long,
and an engine that waited for it would keep all other requests waiting."""

import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lockstep.text.speculative_mask import SpeculativeMask

MAX_SECONDS = 60.0  # of the processor, for all masks of an answer
SERVER_SECONDS = 8.0  # the same, where other receipts wait to be verified
MAX_BYTES = 32 << 20  # packed


class TooMuch(Exception):
    """The masks take more time or memory than is allowed; the message says which."""


class KnownMasks(SpeculativeMask):
    """The masks before each token of a known answer, which any list of its first tokens asks for. masks: packed, or
    None for one that allows all; error: what was raised for the first one that is not there."""

    def __init__(self, masks: Sequence[bytes | None], error: Exception | None) -> None:
        self._masks, self._error = masks, error

    def __call__(self, output_ids: list[int]) -> np.ndarray | None:
        if len(output_ids) >= len(self._masks):
            raise self._error or IndexError(f"a mask after {len(output_ids)} tokens of {len(self._masks)}")
        packed = self._masks[len(output_ids)]
        return None if packed is None else np.frombuffer(zlib.decompress(packed), np.uint32)

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray | None]:
        known = [*output_ids, *drafts]
        for number in range(len(output_ids) + first, len(known) + 1):
            yield self(known[:number])

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        return []

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        raise NotImplementedError("a replay has no drafts")


def known_masks(mask_of: Any, output_ids: Sequence[int], seconds: float = MAX_SECONDS) -> KnownMasks:
    """The masks of a `SamplingParams.logits_mask` before each token of an answer. TooMuch where they take too long."""
    packed: list[bytes | None] = []
    known: list[int] = []  # always the same list, by which a mask tells samples apart
    began, size, error = time.thread_time(), 0, None
    words, made = b"", b""  # of the last mask
    for token in output_ids:
        try:
            mask = mask_of(known)
        except Exception as raised:  # of any class: a grammar that cannot read the answer is a finding
            error = raised
            break
        if mask is not None and np.asarray(mask).tobytes() != words:
            words = np.asarray(mask).tobytes()
            made = zlib.compress(words, 1)
            size += len(made)
        packed.append(None if mask is None else made)
        known.append(token)
        _check(time.thread_time() - began, seconds, size)
    return KnownMasks(packed, error)


def _check(taken: float, seconds: float, size: int) -> None:
    if taken > seconds:
        raise TooMuch(f"the masks of its form take more than {seconds:g} s")
    if size > MAX_BYTES:
        raise TooMuch(f"the masks of its form take more than {MAX_BYTES >> 20} MB")
