"""Loads the model of an `LLM`, with its tokenizer and engine, and the draft model of speculative decoding: a smaller
model of the same vocabulary."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from lockstep.completion import Prompt
from lockstep.engine.answer_text import Detokenizer
from lockstep.engine.async_engine import AsyncEngine, StreamEngine
from lockstep.engine.cache.size import context_size
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.generation_config import sampling_defaults
from lockstep.engine.model import Model, load_model
from lockstep.engine.planned import planned
from lockstep.engine.request import Request, SamplingParams, token_list
from lockstep.engine.speculation.draft_model import check_vocabulary, named
from lockstep.engine.speculation.drafts import MODEL, SOURCES
from lockstep.models.checkpoint import end_of_sequence_ids, open_checkpoint
from lockstep.models.pooling import default_pooling
from lockstep.native.host import team_size
from lockstep.other_names import names_options
from lockstep.progress import OnProgress, Progress, reporting
from lockstep.ptq.solved import Solved
from lockstep.runtime import placement
from lockstep.text.tokenizer.tokenizer import (
    Tokenizer,
    answer_detokenizer,
    check_can_chat,
    check_can_encode,
    find_tokenizer,
    has_tokenizer,
)
from lockstep.user_cache import is_all_kept
from lockstep.weights.checkpoint import Checkpoint
from lockstep.weights.content import ContentHash
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import PackedStore

if TYPE_CHECKING:
    from lockstep.receipts.identity import ModelPart

log = logging.getLogger("lockstep.model")


class LoadOptions(NamedTuple):
    """The arguments of LLM that also hold for its draft model, except rope and packs_lazily. progress: None: of no
    interest."""

    weights: str
    kv_dtype: str | None
    max_context: int | None
    verify: bool
    progress: OnProgress | None
    packs_lazily: bool = False
    rope: str = "auto"

    def report(self, kind: str, done: int, total: int | None) -> None:
        """Reports progress to whom it is of interest."""
        if self.progress is not None:
            self.progress(kind, done, total)


@dataclass(frozen=True)
class Files:
    """The files of a model: its path and its checkpoint."""

    path: Path
    checkpoint: Checkpoint

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. ValueError if it has none."""
        return find_tokenizer(self.path, self.checkpoint.metadata)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint has a tokenizer."""
        return has_tokenizer(self.path, self.checkpoint.metadata)

    def close(self) -> None:
        """Ends the worker process of the tokenizer's chat template, if there is one."""
        if "tokenizer" in self.__dict__:
            self.tokenizer.template_process.jobs.close()

    @property
    def tokenizer_if_any(self) -> Tokenizer | None:
        """The checkpoint's tokenizer; None if it has none."""
        return self.tokenizer if self.has_tokenizer else None


def open_files(path: Path, options: LoadOptions) -> Files:
    """The files at a path. ValueError for those that are no model."""
    return Files(path, open_checkpoint(path, verify=options.verify))


def check_text(files: Files, name: str, needs_text: bool, needs_chat: bool) -> None:
    """ValueError if a model, called `name` in the message, cannot read texts or chat although this is needed; a warning
    if it has no tokenizer and needs none."""
    if needs_chat:
        check_can_chat(files.tokenizer, name)
    elif needs_text:
        check_can_encode(files.tokenizer, name)
    elif not files.has_tokenizer:
        log.warning("%s has no tokenizer that can be used: prompts must be token ids, and answers have no text", name)


def load(files: Files, options: LoadOptions, plan: str | os.PathLike[str] | None = None) -> tuple[Model, PackedStore]:
    """The model of a checkpoint, and the store of its packed weights, which is empty yet. plan: see LLM."""
    store = PackedStore(files.checkpoint, options.progress, options.packs_lazily and plan is None)
    model = load_model(files.checkpoint, store, options.weights, options.kv_dtype, options.max_context, options.rope)
    if plan is not None:
        content = files.checkpoint.content.wait(options.progress)
        model = planned(model, Solved.load(Path(plan)), content)
    return model, store


def load_draft(
    name: str, sources: Sequence[str], target: Model, tokenizer: Tokenizer | None, options: LoadOptions
) -> Model:
    """The draft model called `name`: a folder, a GGUF file or a hub name. ValueError where it cannot be loaded, or its
    vocabulary is not the target's.

    sources: the values of LLM's `speculate` that name no model, for the error message. tokenizer: the target's, or None
    if it has none.
    """
    path, own = _resolve(name, sources, options.report), None
    with named(path):
        files = open_files(path, options)
        model, _ = load(files, options._replace(packs_lazily=False, rope="auto"))
        if tokenizer is not None:
            own = files.tokenizer_if_any
    check_vocabulary(target, model)
    if tokenizer is not None and own is not None:
        check_tokens(tokenizer, own)
    return model


def _resolve(name: str, sources: Sequence[str], progress: OnProgress) -> Path:
    try:
        return resolve_model(name, progress)
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


class LoadedModel:
    """A model with its tokenizer and its engine, on this machine's CPU. See `LLM` for the arguments."""

    @names_options(elsewhere=SamplingParams)
    def __init__(
        self,
        model: str | None = None,
        *,
        weights: str = "auto",
        kv_dtype: str | None = None,
        max_context: int | None = None,
        max_step_tokens: int = 512,
        max_requests: int = 16,
        kv_tokens: int | None = None,
        threads: int | None = None,
        ops: Mapping[str, str] | None = None,
        progress: bool | OnProgress | None = True,
        prefix_cache: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_dir_bytes: int = 8 << 30,
        speculate: str = "off",
        draft: int | None = None,
        plan: str | os.PathLike[str] | None = None,
        rope: str = "auto",
        needs_text: bool = False,
        needs_chat: bool = False,
        generation_config: str = "auto",
        verify_weights: bool = False,
        on_tokenizer: Callable[[Tokenizer], object] | None = None,
        num_engines: int = 1,
        claims_kv: bool = True,
        spare_requests: int = 0,
        packs_lazily: bool = False,
        numa: str = placement.OFF,
    ) -> None:
        if not isinstance(speculate, str):
            expected = f"{', '.join(SOURCES)} or the name of a smaller model"
            raise ValueError(f"speculate: expected {expected}, got {speculate!r:.80}")
        self._nodes = placement.begin(numa)
        options = EngineOptions(
            max_step_tokens=max_step_tokens,
            max_requests=max_requests,
            kv_tokens=kv_tokens,
            threads=threads,
            prefix_cache=prefix_cache,
            cache_dir=cache_dir,
            cache_dir_bytes=cache_dir_bytes,
            speculate=speculate if speculate in SOURCES else MODEL,
            draft=draft,
            num_engines=num_engines,
            claims_kv=claims_kv,
            spare_requests=spare_requests,
        )
        options = replace(options, threads=team_size(threads))  # which are checked by now
        weights = "f32" if plan is not None and weights == "auto" else weights
        self._generation_config, self._shows_progress = generation_config, progress is True
        with reporting(progress) as report:
            asked = LoadOptions(weights, kv_dtype, max_context, verify_weights, report, packs_lazily, rope)
            self._files = open_files(resolve_model(model, asked.report), asked)
            check_text(self._files, model or "the bundled model", needs_text, needs_chat)
            tokenizer = self._files.tokenizer_if_any  # a damaged one is refused before long work begins
            if tokenizer is not None and on_tokenizer is not None:
                on_tokenizer(tokenizer)
            loaded, self._store = load(self._files, asked, plan)
            self._draft = None
            if speculate not in SOURCES:
                self._draft = load_draft(speculate, list(SOURCES), loaded, tokenizer, asked)
            self.context = context_size(loaded, options, max_context, self._draft)
            self.model = replace(loaded, max_context=self.context.num_tokens)
            self.makers_sampling()  # refuses a source that cannot be read
            self.engine = self._new_engine(options, ops, report)
            if isinstance(report, Progress):
                is_kept = report.has("packing", "compiling") and is_all_kept()
                report.ending = "; later starts use what was made now" if is_kept else ""

    def _eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        tokenizer = self._files.tokenizer_if_any
        return end_of_sequence_ids(self._files.checkpoint, tokenizer.eos_ids if tokenizer is not None else ())

    def _detokenizers(self) -> Callable[[Request], Detokenizer] | None:
        """What makes the Detokenizer of a request's answer; None without a tokenizer."""
        tokenizer = self._files.tokenizer_if_any
        return functools.partial(answer_detokenizer, tokenizer) if tokenizer is not None else None

    def _new_engine(self, options: EngineOptions, ops: Mapping[str, str] | None, report: OnProgress | None) -> Engine:
        """The Engine, whose start reads all weights. ValueError if a file was written to meanwhile."""
        checkpoint = self._files.checkpoint
        engine = Engine(self.model, options, ops, self._eos_ids(), self._detokenizers(), report, self._draft)
        try:
            for read in (checkpoint, self._draft.checkpoint) if self._draft else (checkpoint,):
                read.check_unchanged()
        except ValueError:
            engine.close()
            raise
        placement.spread(engine.runner.executor.weight_arrays(), self._nodes)
        for store in (self._store, self._draft.store) if self._draft else (self._store,):
            store.warn_not_kept()
        return engine

    def finish_packing(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Packs the experts that no answer has needed yet, and keeps them for later starts; without packs_lazily there
        are none. Another thread may generate meanwhile. is_stopped: asked again and again; True ends it."""
        self._store.finish(is_stopped)

    @property
    def is_all_packed(self) -> bool:
        """Whether `finish_packing` has nothing to do."""
        return self._store.is_finished

    @contextlib.contextmanager
    def reports_packing(self, progress: OnProgress) -> Iterator[None]:
        """A context in which progress is told of experts that are packed, as ("packing", bytes done, bytes in all)."""
        before, self._store.progress = self._store.progress, progress
        try:
            yield
        finally:
            self._store.progress = before

    def stream_engine(self) -> StreamEngine:
        """What runs requests beside their readers, as a server needs it. From then on nothing else may use `engine`."""
        return AsyncEngine(self.engine)

    @functools.cached_property
    def sampling_defaults(self) -> dict[str, Any]:
        """{field of SamplingParams: value} that the model's makers recommend, from its generation_config.json or GGUF
        metadata. `chat` and `default_params` start from them, `generate` does not. The first access logs a warning for
        each recommended setting that is not supported."""
        return self._makers_sampling()

    def makers_sampling(self) -> dict[str, Any]:
        """As `sampling_defaults`, but without warnings, for callers that do not sample with them."""
        return self._makers_sampling(warn=lambda *_: None)

    def _makers_sampling(self, **warn: Any) -> dict[str, Any]:
        checkpoint = self._files.checkpoint
        own = checkpoint.generation_config, checkpoint.metadata
        return sampling_defaults(self._generation_config, *own, self.vocab_size, **warn)

    @property
    def path(self) -> Path:
        """The model's folder or file."""
        return self._files.path

    @property
    def content(self) -> ContentHash:
        """The SHA-256 of the model's weight files and config, by which packed weights and cached prefixes are named."""
        return self._files.checkpoint.content

    @functools.cached_property
    def model_part(self) -> "ModelPart":
        """What receipts say of the model. Waits until the model's files are hashed."""
        from lockstep.receipts.identity import model_part

        return model_part(self)

    @property
    def max_context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.model.max_context

    @property
    def max_requests(self) -> int:
        """The most sequences that are computed in one step; further requests wait in the queue."""
        return self.engine.limits.max_requests - self.engine.limits.num_spare

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding table, which may be more than the tokenizer has tokens."""
        return self.model.config.vocab_size

    @property
    def hidden_size(self) -> int:
        """D, the length of an embedding from `embed`."""
        return self.model.config.hidden_size

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. ValueError if the checkpoint has none: prompts must then be token ids."""
        return self._files.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint has a tokenizer; without one, prompts are token ids and answers have no text."""
        return self._files.has_tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a string is tokenized, with BOS where the model expects it; token ids are returned as
        they are."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_list(prompt)

    def default_params(self, **fields: Any) -> SamplingParams:
        """SamplingParams with the values that the model's makers recommend, except for the given fields. Where neither
        sets a temperature it is 1, as in OpenAI's API."""
        return SamplingParams(**{"temperature": 1.0, **self.sampling_defaults, **fields})

    @functools.cached_property
    def pooling(self) -> str:
        """The pooling of embeddings that the model's makers recommend: "mean" or "last", which is the default."""
        return default_pooling(self.path, self._files.checkpoint.config)

    def close(self) -> None:
        """Ends the engine's threads and the worker processes. The model cannot be used after that. The end of `with
        LLM() as llm:` does it."""
        try:
            self.engine.close()
        finally:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} has threads and memory: it cannot be copied or pickled; load another")

    def __repr__(self) -> str:
        """Name, family, formats of weights and KV cache, size of the packed weights, context."""
        formats = ", ".join(self.model.main_formats)
        return (
            f"LLM({self.path.name!r}, {self.model.config.model_type}, weights {formats}, KV cache "
            f"{self.model.kv_dtype}, {self._store.num_bytes / 1e6:.0f} MB, context {self.max_context})"
        )
