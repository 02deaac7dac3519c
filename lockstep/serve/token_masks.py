"""Masks for vLLM's allowed_token_ids and bad_words, beside the mask of a grammar."""

from collections.abc import Sequence

from lockstep.serve.errors import check_most, wrong_field
from lockstep.serve.fields.prompts import check_ids, text_tokenizer
from lockstep.serve.service import Service
from lockstep.text.token_masks import Mask, TokenMask, UntilComplete


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
        masks = [mask and UntilComplete(mask, service.vocab_size, service.eos_ids) for mask in masks]
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
