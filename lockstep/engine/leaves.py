"""What a receipt binds of each token: its leaf, taken while the engine runs.

A leaf has LEAF_BYTES bytes: the token's id (uint32), the bits of its log-probability (float32), both little-endian, and
the SHA-256 of the last hidden state, after the final norm (float32 [D], little-endian), of the row that chose it. Given
the weights, the hidden state fixes every logit; the log-probability covers the head's product over the whole
vocabulary; the id covers the choice. `receipts.merkle` makes a tree of leaves.
"""

import hashlib
import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lockstep.engine.request import Request
    from lockstep.engine.runner import Span

LEAF_BYTES = 40
_TOKEN = struct.Struct("<If")


def leaf(token: int, logprob: float, hidden_D: np.ndarray) -> bytes:
    """The leaf of one token. logprob: a float32, as a Python number. hidden_D: float32 [D], contiguous."""
    return _TOKEN.pack(token, logprob) + hashlib.sha256(hidden_D.data).digest()


class Leaves:
    """The leaves of one request, as far as its tokens are computed.

    answer: of the tokens of the answer, one after the other. prompt: of the prompt's tokens from the second on, for a
    request that reports their log-probabilities. Those of the first tokens may be known.
    """

    def __init__(self, answer: bytes = b"", prompt: bytes = b"") -> None:
        self.answer, self.prompt = bytearray(answer), bytearray(prompt)

    @property
    def num_answer(self) -> int:
        """Tokens of the answer that have a leaf."""
        return len(self.answer) // LEAF_BYTES

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt that have a leaf."""
        return len(self.prompt) // LEAF_BYTES

    def take(self, request: "Request", span: "Span", hidden_ED: np.ndarray) -> None:
        """Adds the leaves of all tokens of a request that have a log-probability but no leaf yet.

        span: of the step that gave these log-probabilities. hidden_ED: float32 [E, D], the hidden states of its
        embedded rows. The row at position i chose the token at position i + 1, or reported it.
        """
        hidden_at = {span.start + row: hidden_D for row, hidden_D in zip(span.embedded, hidden_ED, strict=True)}
        prompt, last = request.prompt_ids, len(request.prompt_ids) - 1
        for i in range(self.num_prompt, len(request.prompt_logprobs)):
            self.prompt += leaf(prompt[i + 1], request.prompt_logprobs[i], hidden_at[i])
        for i in range(self.num_answer, min(len(request.output_ids), len(request.logprobs))):
            self.answer += leaf(request.output_ids[i], request.logprobs[i], hidden_at[last + i])
