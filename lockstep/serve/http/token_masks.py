"""Masks for vLLM's allowed_token_ids and bad_words, beside the mask of a grammar."""
from collections.abc import Callable, Sequence

import numpy as np

from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.prompts import check_ids, text_tokenizer


class TokenMask:
    """A logits_mask (see SamplingParams) that leaves out tokens, and what another mask does not allow.

    allowed: token ids, or None for all; banned: sequences of token ids, whose last token is not allowed after the
    others. It has no state of its own, so that several samples may share it.
    """

    def __init__(self, vocab_size: int, allowed: Sequence[int] | None, banned: Sequence[Sequence[int]], other=None):
        self._bits = np.zeros(-(-vocab_size // 32), np.uint32)
        self._set(self._bits, np.arange(vocab_size) if allowed is None else np.array(allowed, np.int64))
        single = [ids[0] for ids in banned if len(ids) == 1]
        self._clear(self._bits, single)
        self._longer = [(list(ids[:-1]), ids[-1]) for ids in banned if len(ids) > 1]
        self._other = other

    @staticmethod
    def _set(bits: np.ndarray, ids: np.ndarray) -> None:
        np.bitwise_or.at(bits, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))

    @staticmethod
    def _clear(bits: np.ndarray, ids: Sequence[int]) -> None:
        for each in ids:
            bits[each // 32] &= ~np.uint32(1 << each % 32)

    def __call__(self, output_ids: list[int]) -> np.ndarray:
        """uint32 [ceil(vocabulary / 32)] for the token after these."""
        ended = [last for before, last in self._longer if output_ids[-len(before):] == before]
        found = None if self._other is None else self._other(output_ids)
        if found is None and not ended:
            return self._bits
        bits = self._bits.copy() if found is None else self._bits & np.asarray(found).view(np.uint32)
        self._clear(bits, ended)
        return bits


def token_mask(service, fields) -> Callable | None:
    """What makes a TokenMask of a grammar's mask, or of None, for a request's SamplingFields; None where they leave no
    token out. It tokenizes: it may take a while. ApiError 400."""
    allowed, words = fields.allowed_token_ids, fields.bad_words
    if allowed is None and not words:
        return None
    if allowed is not None:
        if not allowed:
            raise bad_request("allowed_token_ids: expected at least one token id, got none", "allowed_token_ids",
                              "invalid_value")
        allowed = check_ids(service, allowed, "allowed_token_ids")
    banned = bad_sequences(service, words or [])
    return lambda other: TokenMask(service.llm.model.config.vocab_size, allowed, banned, other)


def bad_sequences(service, words: list[str]) -> list[list[int]]:
    """Token ids of words, in the middle of a text and, where that is another single token, after a space: as vLLM."""
    limits, made = service.limits, []
    if len(words) > limits.max_logit_bias:
        raise bad_request(f"bad_words: expected at most {limits.max_logit_bias} words, got {len(words)}", "bad_words",
                          "invalid_value")
    for word in words:
        if not word.strip() or len(word) > limits.max_stop_chars:
            raise bad_request(f"bad_words: expected words of 1 to {limits.max_stop_chars} characters, got "
                              f"{word[:80]!r}", "bad_words", "invalid_value")
        encode = text_tokenizer(service).encode
        plain = encode(word.lstrip(), add_special_tokens=False)
        spaced = encode(f" {word.lstrip()}", add_special_tokens=False)
        if not plain:
            raise bad_request(f"bad_words: expected words that have tokens, got {word!r}", "bad_words", "invalid_value")
        made.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            made.append(spaced)
    return made
