"""Loads the draft model of speculative decoding: a smaller model with the same vocabulary as the target model."""

from pathlib import Path
from typing import NamedTuple

from lockstep.engine.model import Model, load_model
from lockstep.engine.speculation.draft_model import check_vocabulary, named
from lockstep.models.checkpoint import open_checkpoint
from lockstep.progress import OnProgress
from lockstep.text.tokenizer.tokenizer import Tokenizer, find_tokenizer, has_tokenizer
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import PackedStore


class LoadOptions(NamedTuple):
    """The arguments of LLM that also hold for its draft model."""

    weights: str
    kv_dtype: str | None
    max_context: int | None
    progress: OnProgress | None
    verify: bool


def load_draft(
    name: str, sources: tuple[str, ...], target: Model, tokenizer: Tokenizer | None, options: LoadOptions
) -> Model:
    """The draft model called `name`: a folder, a GGUF file or a hub name. ValueError where it cannot be loaded, or its
    vocabulary is not the target's.

    sources: the values of LLM's `speculate` that name no model, for the error message. tokenizer: the target's, or None
    if it has none.
    """
    path, own = _resolve(name, sources), None
    with named(path):
        checkpoint = open_checkpoint(path, verify=options.verify)
        store = PackedStore(checkpoint, options.progress)
        model = load_model(checkpoint, store, options.weights, options.kv_dtype, options.max_context)
        if tokenizer is not None and has_tokenizer(path, checkpoint.metadata):
            own = find_tokenizer(path, checkpoint.metadata)
    check_vocabulary(target, model)
    if tokenizer is not None and own is not None:
        check_tokens(tokenizer, own)
    return model


def _resolve(name: str, sources: tuple[str, ...]) -> Path:
    try:
        return resolve_model(name)
    except ValueError as error:
        raise ValueError(f"speculate: expected {', '.join(sources)} or a smaller model; {error}") from None


def check_tokens(target: Tokenizer, draft: Tokenizer) -> None:
    """ValueError that names the first token id whose token is another one in the draft model than in the target.

    Ids beyond the end of the shorter vocabulary are not compared: they are padding, which some files name.
    """
    of_target, of_draft = _tokens(target), _tokens(draft)
    for token_id in range(min(max(of_target, default=-1), max(of_draft, default=-1)) + 1):
        expected, got = of_target.get(token_id), of_draft.get(token_id)
        if expected != got:
            raise ValueError(
                f"speculate: the draft model has another vocabulary: its token {token_id} is {_shown(got)}, that of "
                f"the model is {_shown(expected)}"
            )


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """{token id: token}, added tokens included."""
    return {token_id: token for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}


def _shown(token: str | None) -> str:
    return "none" if token is None else f"{token!r:.80}"
