"""Loads a smaller model that drafts for another, if both have the same vocabulary."""

from collections.abc import Mapping
from typing import NamedTuple

from lockstep.engine.draft_model import check_vocabulary
from lockstep.engine.model import Model, load_model
from lockstep.serve.hub import resolve_model
from lockstep.serve.tokenizer import Tokenizer, find_tokenizer, has_tokenizer
from lockstep.weights.checkpoint import Checkpoint, open_checkpoint
from lockstep.weights.content import Progress
from lockstep.weights.store import PackedStore


class Sizes(NamedTuple):
    """How a draft model is loaded, as `load_model` has it: as the model is that it drafts for."""

    weights: str
    kv_dtype: str | None
    max_context: int | None


def open_draft(name: str, choices: tuple[str, ...], verify: bool) -> Checkpoint:
    """The checkpoint of a draft model. ValueError for a name that is none, and none of the choices beside."""
    try:
        return open_checkpoint(resolve_model(name), verify=verify)
    except ValueError as error:
        raise ValueError(f"speculate: expected {', '.join(choices)} or a smaller model; {error}") from None


def load_draft(
    checkpoint: Checkpoint, target: Model, tokenizer: Tokenizer | None, sizes: Sizes, progress: Progress | None
) -> Model:
    """The draft model of a checkpoint. ValueError where its vocabulary is not the target's.

    tokenizer: the target's, or None if it has none.
    """
    model = load_model(checkpoint, PackedStore(checkpoint, progress), *sizes)
    check_vocabulary(target, model)
    if tokenizer is not None and has_tokenizer(checkpoint.path, checkpoint.metadata):
        check_tokens(tokenizer, find_tokenizer(checkpoint.path, checkpoint.metadata))
    return model


def check_tokens(target: Tokenizer, draft: Tokenizer) -> None:
    """ValueError that names the first token id which means one thing to the target and another to the draft model.

    Ids after one vocabulary's last are its padding, which has names in some files and in others none.
    """
    ours, theirs = _tokens(target), _tokens(draft)
    for token_id in range(min(max(ours, default=-1), max(theirs, default=-1)) + 1):
        one, other = ours.get(token_id), theirs.get(token_id)
        if one != other:
            raise ValueError(
                f"speculate: the draft model has another vocabulary: token {token_id} is {_shown(other)}, and "
                f"{_shown(one)} in the model's"
            )


def _tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {token_id: token for token, token_id in vocabulary.items()}


def _shown(token: str | None) -> str:
    return "nothing" if token is None else f"{token!r:.80}"
