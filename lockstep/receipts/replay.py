"""Replays an answer: takes in the hidden states of one prefill of prompt and answer, and has the head and the sampler
choose every token again, as they did when the answer was made.

Row k of the answer is the row that chose its token k. What a row's choice depends on besides its logits (penalties,
banned end tokens, the mask of a form) depends on the tokens before, which are known, as those of drafts are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lockstep.engine.leaves import leaf
from lockstep.engine.request import SamplingParams, sample_seed
from lockstep.engine.sampling import Adjustment, adjusts
from lockstep.receipts.head_blocks import HeadBlocks
from lockstep.receipts.merkle import leaf_hash
from lockstep.receipts.statement import TAG_BYTES
from lockstep.text.speculative_mask import SpeculativeMask


@dataclass(frozen=True)
class Mismatch:
    """Where a replay differs from what a receipt claims, or cannot have been so.

    what: "token", "leaf", "form", "logits" or "prompt logits". position: of the token in the answer, or of its row in
    the prompt. claimed, found: tokens, or tags as hexadecimal digits; None where there is nothing to compare.
    """

    what: str
    position: int
    claimed: int | str | None = None
    found: int | str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Replayed:
    """What is replayed. params: of the request, with the mask of its form.
    sample: the number of the answer among its samples. eos_ids: end tokens. tags: TAG_BYTES of the hash of each leaf of
    the answer, or empty."""

    prompt_ids: list[int]
    output_ids: list[int]
    params: SamplingParams
    sample: int
    eos_ids: frozenset[int]
    vocab_size: int
    tags: bytes = b""

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute: all but the last of the answer, after which no row follows."""
        return self.prompt_ids + self.output_ids[:-1]

    @property
    def num_rows(self) -> int:
        """How many rows are needed: none for an answer without tokens, unless the prompt was reported."""
        num_prompt = len(self.prompt_ids) - 1 if self.params.prompt_logprobs is not None else 0
        return num_prompt + len(self.output_ids)

    @property
    def first_row(self) -> int:
        """The position of the first row that is needed."""
        return 0 if self.params.prompt_logprobs is not None else len(self.prompt_ids) - 1


class Replay:
    """A Reader (`engine.embedding`) of an answer's rows. `mismatch` is the first one found, after which it has ended;
    `answer` and `prompt` are the leaves found, and their order is that of `engine.leaves.Leaves`."""

    needs_only_last = False
    is_finite = True  # a state that is not finite is a mismatch

    def __init__(self, replayed: Replayed, head: HeadBlocks) -> None:
        self._of, self._head = replayed, head
        self.answer, self.prompt = bytearray(), bytearray()
        self.mismatch: Mismatch | None = None
        self._num_taken = 0
        self._records = Records(replayed)

    @property
    def has_ended(self) -> bool:
        """Whether it differs already."""
        return self.mismatch is not None

    def rows(self, start: int, end: int) -> range:
        """The rows of a step on tokens start .. end whose hidden states are needed, counted from start."""
        return range(max(self._of.first_row + self._num_taken, start) - start, end - start)

    def take(self, hidden_ED: np.ndarray) -> None:
        """Replays the rows that follow those taken so far: float32 [E, D]."""
        for first in range(0, len(hidden_ED), self._head.rows):
            if self.mismatch is None:
                self._take_block(hidden_ED[first : first + self._head.rows])

    def _take_block(self, hidden_ED: np.ndarray) -> None:
        at = self._of.first_row + self._num_taken
        records = self._records.of(at, len(hidden_ED))
        tokens, logprobs = self._head.run(hidden_ED[: len(records)], records)
        for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            if self.mismatch is None:
                self._take_row(at + row, row, hidden_ED[row], token, logprob)
        if self.mismatch is None and self._records.refused is not None:
            position = at + len(records) - len(self._of.prompt_ids) + 1
            self.mismatch = Mismatch("form", position, reason=str(self._records.refused))
        self._num_taken += len(records)

    def _take_row(self, at: int, row: int, hidden_D: np.ndarray, token: int, logprob: float) -> None:
        """Compares the row at a position of the sequence, which is row `row` of its block, and adds its leaf."""
        number = at - len(self._of.prompt_ids) + 1  # of the token in the answer
        if number < 0:
            self._note_not_finite(logprob, "prompt logits", at)
            self.prompt += leaf(self._of.prompt_ids[at + 1], logprob, hidden_D)
            return
        claimed = self._of.output_ids[number]
        self._note_not_finite(logprob, "logits", number)
        if token != claimed:
            self.mismatch = self.mismatch or Mismatch("token", number, claimed, token)
        elif self._head.is_forbidden(row, token):
            self.mismatch = self.mismatch or Mismatch("form", number, claimed, reason="no token is allowed there")
        found = leaf(claimed, logprob, hidden_D)
        self.answer += found
        if self._of.tags and self.mismatch is None:
            self._compare_tag(number, leaf_hash(found)[:TAG_BYTES])

    def _note_not_finite(self, logprob: float, what: str, position: int) -> None:
        if not math.isfinite(logprob):
            self.mismatch = self.mismatch or Mismatch(what, position, reason="they are not finite")

    def _compare_tag(self, number: int, found: bytes) -> None:
        claimed = self._of.tags[number * TAG_BYTES : (number + 1) * TAG_BYTES]
        if found != claimed:
            self.mismatch = Mismatch("leaf", number, claimed.hex(), found.hex())


class Records:
    """The fields of the SAMPLING_RECORDs of an answer's rows."""

    def __init__(self, replayed: Replayed) -> None:
        p = replayed.params
        self._of, self._adjustment = replayed, None
        self._mask = None if p.logits_mask is None else InTurn(p.logits_mask)
        if adjusts(p):
            # no token follows the last one, so that no memory is needed for what max_tokens would allow
            held = replace(p, logits_mask=self._mask, max_tokens=max(len(replayed.output_ids), p.min_tokens, 1))
            self._adjustment = Adjustment(replayed.prompt_ids, held, replayed.eos_ids, replayed.vocab_size)
        seed = sample_seed(p.seed, replayed.sample)
        self._shared = dict(temperature=p.temperature, top_p=p.top_p, min_p=p.min_p, top_k=p.top_k, seed=seed)

    @property
    def refused(self) -> Exception | None:
        """Why the mask ended, before the rows that `of` left out last."""
        return self._mask and self._mask.error

    def of(self, at: int, num_rows: int) -> list[dict[str, Any]]:
        """The fields of the rows at positions at .. at + num_rows; fewer where the mask ends. Valid until the next
        call."""
        prompt, first = self._of.prompt_ids, at - len(self._of.prompt_ids) + 1
        given = [dict(given=1 + prompt[i + 1]) for i in range(at, min(at + num_rows, len(prompt) - 1))]
        first, num_left = max(0, first), num_rows - len(given)
        return given + [
            dict(position=len(prompt) + first + i, **self._shared, **fields)
            for i, fields in enumerate(self._adjusted(first, num_left))
        ]

    def _adjusted(self, first: int, num_rows: int) -> list[dict[str, int]]:
        if self._adjustment is None or not num_rows:
            return [{}] * num_rows
        output = self._of.output_ids
        return self._adjustment.rows(output[:first], output[first : first + num_rows - 1])


class InTurn(SpeculativeMask):
    """A mask that is asked about many tokens at once, and asks another for one after the other, as the engine does
    without drafts. error: what the other raised, with which the masks end."""

    def __init__(self, mask_of: Any) -> None:
        self._mask_of, self._known = mask_of, []
        self.error: Exception | None = None

    def __call__(self, output_ids: list[int]) -> np.ndarray | None:
        return self._mask_of(self._known_up_to(output_ids))

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray | None]:
        try:
            yield self(output_ids)
            for token in drafts:
                self._known.append(token)
                yield self._mask_of(self._known)
        except Exception as error:  # of any class: a grammar that cannot read the answer is a finding
            self.error = error

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        return []

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        raise NotImplementedError("a replay has no drafts")

    def _known_up_to(self, output_ids: list[int]) -> list[int]:
        """A list of the same tokens that is always the same object, by which a mask tells samples apart."""
        self._known.extend(output_ids[len(self._known) :])
        return self._known
