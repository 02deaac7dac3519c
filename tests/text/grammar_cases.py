"""Shared by tests of grammars: tokenizers of every kind, whether a text is allowed, and random allowed answers."""

import numpy as np
import pytest

from lockstep.text.grammars.structured import Grammars
from lockstep.text.tokenizer.tokenizer import Tokenizer, tokenizer_from_gguf
from tests.text.vocabularies import byte_fallback, byte_level, gguf_metadata, sentencepiece_metadata


def known(backend):
    return Tokenizer(backend, frozenset({0}), None, {}, {})


TOKENIZERS = dict(
    byte_level=known(byte_level()),
    byte_fallback=known(byte_fallback()),
    gguf=tokenizer_from_gguf(gguf_metadata(byte_level(), "gpt-2", eos_token_id=0)),
    sentencepiece=tokenizer_from_gguf(sentencepiece_metadata(byte_fallback())),
)
SPARE = 70  # rows of the logits without a token, in more than a word of a mask: embeddings are padded
GRAMMARS = {name: Grammars(t, t.eos_ids, t.vocab_size + SPARE) for name, t in TOKENIZERS.items()}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)


def allowed(words):
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def allows(kind, grammar, text):
    """Whether the whole text, token by token, and then an end token are allowed."""
    tokenizer, mask, ids = TOKENIZERS[kind], GRAMMARS[kind].mask(grammar), []
    for token in [*tokenizer.encode(text, add_special_tokens=False), min(tokenizer.eos_ids)]:
        if token not in allowed(mask(ids)):
            return False
        ids.append(token)
    return True


def random_answer(kind, grammar, rng, most=400):
    """A text made of random allowed tokens; None if it did not end."""
    tokenizer, mask, ids = TOKENIZERS[kind], GRAMMARS[kind].mask(grammar), []
    for _ in range(most):
        options = allowed(mask(ids))
        assert len(options) and max(options) < tokenizer.vocab_size
        ids.append(int(rng.choice(options)))
        if ids[-1] in tokenizer.eos_ids:
            return tokenizer.decode(ids[:-1])
    return None


PERSON = dict(
    type="object",
    required=["name", "age"],
    additionalProperties=False,
    properties=dict(name=dict(type="string", maxLength=5), age=dict(type="integer", minimum=0, maximum=150)),
)
MIN = -(1 << 63)
