"""`LLM`: offline generation from Python."""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.completion import Completion, completion
from lockstep.draft_model import HowLoaded, load_draft
from lockstep.engine.cache.size import context_size
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.generation_config import sampling_defaults
from lockstep.engine.model import load_model
from lockstep.engine.planned import planned
from lockstep.engine.request import Request, SamplingParams, check_single, token_list
from lockstep.engine.speculation.drafts import MODEL, SOURCES
from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.config import end_ids, text_config
from lockstep.models.pooling import default_pooling
from lockstep.native.kernel import OnCompile
from lockstep.ptq.solved import Solved
from lockstep.text.tokenizer.tokenizer import Tokenizer, answer_reader, check_can_chat, find_tokenizer, has_tokenizer
from lockstep.weights.content import ContentHash, Progress
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import PackedStore

Prompt = str | Sequence[int]  # text, or token ids
log = logging.getLogger("lockstep.model")


class Stream:
    """The text of a request so far; `new_text` is what came with the last `advance`, and is never taken back."""

    def __init__(self, request: Request) -> None:
        self.request, self.text, self.new_text = request, "", ""

    def advance(self) -> None:
        """Takes in what the engine has added to the request."""
        self.new_text = self.request.text[len(self.text) :]
        self.text += self.new_text


class LLM:
    """A model that answers.

    model: a Hugging Face folder, a GGUF file, a hub name, or None for the bundled model. weights: "auto" (as stored),
    "f32", "bf16", "q8_0" or "q4_0". kv_dtype: "bf16", "f32" or "q8". ops: swaps of the op table, such as
    {"linear": "reference"}. progress: called with (what, done, total) while weights are packed. prefix_cache: whether
    requests use what earlier ones computed for the same first tokens; cache_dir: a folder of at most cache_dir_bytes
    that keeps it across restarts. speculate, draft: see EngineOptions; speculate may also be the name, as `model` has
    it, of a smaller model of the same vocabulary, which drafts; weights and kv_dtype are then those of both.
    plan: a file with a solved quantization plan for this model (`lockstep ptq`), on whose grids it then runs; weights
    and kv_dtype are f32 then. needs_chat: refuse a model without a chat template. generation_config: where
    sampling_defaults come from: "auto" (the model's own), "none", or a folder with a generation_config.json.
    max_context: tokens that a prompt and its answer may have, never more than kv_tokens hold; None: the model's own, as
    far as its KV cache has room (in kv_tokens, or in half of the memory that is free beside the weights).
    verify_weights: read all of the weights, packed ones too, and check their hashes, although they were checked before.
    on_compile: called with the name of each kernel whose compilation starts, by any thread.
    Raises ValueError, in one sentence, for a model that cannot be loaded.

    context: the ContextSize that came of it.
    """

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
        progress: Progress | None = None,
        prefix_cache: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_dir_bytes: int = 8 << 30,
        speculate: str = "off",
        draft: int | None = None,
        plan: str | os.PathLike[str] | None = None,
        needs_chat: bool = False,
        generation_config: str = "auto",
        verify_weights: bool = False,
        on_compile: OnCompile | None = None,
    ) -> None:
        self.path = resolve_model(model)
        self._checkpoint = checkpoint = open_checkpoint(self.path, verify=verify_weights)
        if needs_chat:
            check_can_chat(self.tokenizer if self.has_tokenizer else None, model or "the bundled model")
        self._store = PackedStore(checkpoint, progress)
        weights = "f32" if plan is not None and weights == "auto" else weights
        loaded = load_model(checkpoint, self._store, weights, kv_dtype, max_context)
        if plan is not None:
            loaded = planned(loaded, Solved.load(Path(plan)), checkpoint.content.wait(progress))
        self._draft = None
        if not isinstance(speculate, str):
            words = ", ".join(SOURCES)
            raise ValueError(f"speculate: expected {words} or the name of a smaller model, got {speculate!r:.80}")
        if speculate not in SOURCES:
            reads_alike = self.tokenizer if self.has_tokenizer else None
            how = HowLoaded(weights, kv_dtype, max_context, progress, verify_weights)
            self._draft, speculate = load_draft(speculate, tuple(SOURCES), loaded, reads_alike, how), MODEL
        options = EngineOptions(
            max_step_tokens=max_step_tokens,
            max_requests=max_requests,
            kv_tokens=kv_tokens,
            threads=threads,
            prefix_cache=prefix_cache,
            cache_dir=cache_dir,
            cache_dir_bytes=cache_dir_bytes,
            speculate=speculate,
            draft=draft,
        )
        self.context = context_size(loaded, options, max_context, self._draft)
        self.model = replace(loaded, max_context=self.context.num_tokens)
        self._makers_sampling = functools.partial(
            sampling_defaults, generation_config, checkpoint.generation_config, checkpoint.metadata, self.vocab_size
        )
        self.makers_sampling()  # refuses a source that cannot be read
        reader = functools.partial(answer_reader, self.tokenizer) if self.has_tokenizer else None
        self.engine = Engine(self.model, options, ops, self._eos_ids(), reader, on_compile, self._draft)
        try:
            for each in (checkpoint, self._draft.checkpoint) if self._draft else (checkpoint,):
                each.check_unchanged()  # all weights have been read
        except ValueError:
            self.engine.close()
            raise

    @functools.cached_property
    def sampling_defaults(self) -> dict[str, Any]:
        """{field of SamplingParams: value} as the model's makers want it sampled; `chat` and `default_params` begin
        with them, `generate` does not. When they are first asked for, what cannot be had of them is warned about."""
        return self._makers_sampling()

    def makers_sampling(self) -> dict[str, Any]:
        """The same without warnings, for those who do not sample so."""
        return self._makers_sampling(warn=lambda *_: None)

    @property
    def content(self) -> ContentHash:
        """The hash of the model's weight files and config, which is its name."""
        return self._checkpoint.content

    @property
    def num_bytes_not_kept(self) -> int:
        """Bytes of packed weights that the cache folder had no room for: they are packed again at the next start."""
        return self._store.num_bytes_not_kept

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together, as far as the model goes."""
        return self.model.max_context

    @property
    def max_requests(self) -> int:
        """Sequences that run together."""
        return self.engine.limits.max_requests

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return self.model.config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Numbers in an embedding."""
        return self.model.config.hidden_size

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. ValueError if it has none: prompts must then be token ids."""
        return find_tokenizer(self.path, self._checkpoint.metadata)

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be encoded; without a tokenizer prompts are token ids and answers have no text."""
        return has_tokenizer(self.path, self._checkpoint.metadata)

    def _eos_ids(self) -> frozenset[int]:
        """Every id that the config, the generation config or the tokenizer calls an end."""
        config = self._checkpoint.config
        ids = {
            *end_ids(config),
            *end_ids(text_config(config)),
            *end_ids(self._checkpoint.generation_config, "generation_config.json"),
        }
        ids |= self.tokenizer.eos_ids if self.has_tokenizer else set()
        vocab_size = self.vocab_size
        if strange := sorted(i for i in ids if not 0 <= i < vocab_size):
            log.warning("%s: end tokens %s are ignored: the model has %d tokens", self.path, strange, vocab_size)
        return frozenset(ids.difference(strange))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a string, or ids as they are."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_list(prompt)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat format. ValueError if it has none, or refuses.

        What the chat template cannot say is put otherwise (text/templates/fallbacks.py), unless there are tools: then
        it gets all as it is.
        """
        if tools is not None:
            return self.tokenizer.encode_chat(messages, tools, **options)
        return self.tokenizer.encode(self._without_tools(messages, **options), add_special_tokens=False)

    @functools.cached_property
    def _without_tools(self) -> Callable[..., str]:
        from lockstep.text.templates.beside_calls import prompts_without_tools  # grammars take a while to import

        return prompts_without_tools(self.tokenizer)

    def default_params(self, **fields: Any) -> SamplingParams:
        """SamplingParams as the model's makers want them; fields that are given come first.

        Where nobody says a temperature it is 1, as in OpenAI's API.
        """
        return SamplingParams(**{"temperature": 1.0, **self.sampling_defaults, **fields})

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        prediction: Prompt | None = None,
        **options: Any,
    ) -> Completion:
        """The model's answer to a conversation: a list of {"role", "content"}, as its chat template knows them.

        params: None for `default_params`, and as many tokens as the context has room for. prediction: see `generate`.
        options: of `chat_prompt`, such as tools or variables of the template. ValueError if the model has no chat
        template or it refuses.
        """
        ids = self.chat_prompt(messages, **options)
        if params is None:
            params = self.default_params(max_tokens=max(1, self.max_context - len(ids)))
        return self.generate([ids], params, [prediction])[0]

    def start(
        self, prompt: Prompt, params: SamplingParams = SamplingParams(), prediction: Prompt | None = None
    ) -> Stream:
        """Queues one prompt; returns its Stream. prediction: see `generate`."""
        check_single(params)
        return self.start_samples(prompt, params, prediction)[0]

    def start_samples(self, prompt: Prompt, params: SamplingParams, prediction: Prompt | None = None) -> list[Stream]:
        """Queues the `params.n` samples of a prompt; returns a Stream for each. prediction: see `generate`."""
        made = self.engine.add_samples(self.encode(prompt), params, prediction=self._predicted(prediction))
        return [Stream(request) for request in made]

    def _predicted(self, prediction: Prompt | None) -> Sequence[int]:
        """Token ids of a prediction."""
        if not isinstance(prediction, str):
            return () if prediction is None else prediction
        try:
            return self.tokenizer.encode(prediction, add_special_tokens=False, most=self.max_context)
        except ValueError as error:
            raise ValueError(f"prediction: {error}") from None

    def stream(
        self, prompt: Prompt, params: SamplingParams = SamplingParams(), prediction: Prompt | None = None
    ) -> Iterator[Stream]:
        """Yields the Stream of one prompt after every token, or after several that came with a step of drafts or with
        another call's steps. prediction: see `generate`.

        Closing the generator cancels the request.
        """
        made, known = self.start(prompt, params, prediction), (0, None)
        try:
            while known[1] is None:
                now = len(made.request.output_ids), made.request.finish_reason
                if now == known:
                    self.engine.step()
                    continue
                known = now
                made.advance()
                yield made
        finally:
            self.engine.cancel(made.request)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        prediction: str | Sequence[Prompt | None] | None = None,
    ) -> list[Completion]:
        """Answers all prompts (strings or lists of token ids) together; returns a Completion for each, in order.

        params: one SamplingParams for all, or a list with one for each prompt; by default the most probable tokens,
        whatever the model's makers ask for (that is `default_params`). With n > 1 the Completion is that of
        the first sample, and its `samples` are all. prediction: a text that the answers are likely to be much like, or
        a list with one (text, token ids or None) for each prompt: with speculate "auto" or "lookup", answers come
        sooner where they are.
        """
        prompts = _prompt_list(prompts)
        each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params: expected one or {len(prompts)}, got {len(each)}")
        predicted = list(prediction) if isinstance(prediction, (list, tuple)) else [prediction] * len(prompts)
        if len(predicted) != len(prompts):
            raise ValueError(f"prediction: expected one text or a list of {len(prompts)}, got {len(predicted)}")
        return [
            completion(*[stream.request for stream in streams]) for streams in self._answered(prompts, each, predicted)
        ]

    @functools.cached_property
    def pooling(self) -> str:
        """How the model's makers want embeddings pooled; "last" where they do not say."""
        return default_pooling(self.path, self._checkpoint.config)

    def embed(
        self, prompts: Prompt | Iterable[Prompt], pooling: str | None = None, normalize: bool = True
    ) -> np.ndarray:
        """Embeddings of prompts (strings or lists of token ids), float32 [prompts, D], the same bits in any company.

        Each comes from the hidden states after the model's final norm: the last token's ("last"), or the mean over all
        tokens ("mean"); None: as the model's makers want it. normalize: to length 1. ValueError for a prompt that
        cannot run, or for which the model gives no finite numbers.
        """
        prompts, params = _prompt_list(prompts), SamplingParams(pooling=self.pooling if pooling is None else pooling)
        started = self._answered(prompts, [params] * len(prompts), [None] * len(prompts))
        failed = next((s.request.error for streams in started for s in streams if s.request.error), None)
        if failed is not None:
            raise ValueError(failed)
        made = [pool.embedding(normalize) for streams in started if (pool := streams[0].request.pool) is not None]
        return np.stack(made) if made else np.zeros((0, self.hidden_size), np.float32)

    def _answered(
        self, prompts: list[Prompt], each: Sequence[SamplingParams], predicted: Sequence[Any]
    ) -> list[list[Stream]]:
        """Runs every prompt's samples to their end, or none if one prompt is refused."""
        started = []
        try:
            for asked in zip(prompts, each, predicted, strict=True):
                started.append(self.start_samples(*asked))
        except BaseException:
            self._cancel([s for streams in started for s in streams])
            raise
        self._run([s for streams in started for s in streams])
        return started

    def _run(self, streams: Sequence[Stream]) -> None:
        """Runs steps until these have ended; if that is interrupted, they are cancelled."""
        left = list(streams)
        try:
            while left:
                if left[-1].request.finish_reason is None:
                    self.engine.step()
                else:
                    left.pop().advance()
        finally:
            self._cancel(left)

    def _cancel(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            self.engine.cancel(stream.request)

    def close(self) -> None:
        """Ends the engine's threads."""
        self.engine.close()


def _prompt_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several as a list."""
    if isinstance(prompts, str):
        return [prompts]
    listed: Any = prompts
    try:
        return list(listed)
    except TypeError:
        raise ValueError(f"prompts: expected text or a list of prompts, got {prompts!r:.80}") from None
