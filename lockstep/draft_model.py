"""Loads a smaller model that drafts for another, if both have the same vocabulary."""

from pathlib import Path
from typing import NamedTuple

from lockstep.engine.model import Model, load_model
from lockstep.engine.speculation.draft_model import check_vocabulary, named
from lockstep.models.checkpoint import open_checkpoint
from lockstep.text.tokenizer.tokenizer import Tokenizer, find_tokenizer, has_tokenizer
from lockstep.weights.content import Progress
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import PackedStore


class HowLoaded(NamedTuple):
    """How a model is loaded: see LLM."""

    weights: str
    kv_dtype: str | None
    max_context: int | None
    progress: Progress | None
    verify: bool


def load_draft(name: str, others: tuple[str, ...], target: Model, tokenizer: Tokenizer | None, how: HowLoaded) -> Model:
    """The model of a name, which is to draft for the target. ValueError where it cannot be loaded, or its vocabulary is
    another.

    others: what speculation knows beside names of models. tokenizer: the target's, or None if it has none.
    """
    path, own = _found(name, others), None
    with named(path):
        checkpoint = open_checkpoint(path, verify=how.verify)
        store = PackedStore(checkpoint, how.progress)
        model = load_model(checkpoint, store, how.weights, how.kv_dtype, how.max_context)
        if tokenizer is not None and has_tokenizer(path, checkpoint.metadata):
            own = find_tokenizer(path, checkpoint.metadata)
    check_vocabulary(target, model)
    if tokenizer is not None and own is not None:
        check_tokens(tokenizer, own)
    return model


def _found(name: str, others: tuple[str, ...]) -> Path:
    try:
        return resolve_model(name)
    except ValueError as error:
        raise ValueError(f"speculate: expected {', '.join(others)} or a smaller model; {error}") from None


def check_tokens(target: Tokenizer, draft: Tokenizer) -> None:
    """ValueError that names the first token id which means one thing to the target and another to the draft model.

    Ids after the last one of either vocabulary are padding, which has names in some files and none in others.
    """
    ours, theirs = _tokens(target), _tokens(draft)
    for token_id in range(min(max(ours, default=-1), max(theirs, default=-1)) + 1):
        one, other = ours.get(token_id), theirs.get(token_id)
        if one != other:
            raise ValueError(
                f"speculate: the draft model has another vocabulary: its token {token_id} is {_shown(other)}, that of "
                f"the model is {_shown(one)}"
            )


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """{token id: token}, added ones included."""
    return {token_id: token for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}


def _shown(token: str | None) -> str:
    return "none" if token is None else f"{token!r:.80}"
