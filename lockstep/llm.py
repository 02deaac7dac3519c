"""`LLM`: offline generation from Python."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from lockstep.completion import Completion, Prompt, Stream, completion, prompt_list, run_all
from lockstep.draft_model import LoadOptions, load_draft
from lockstep.engine.cache.size import context_size
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.generation_config import sampling_defaults
from lockstep.engine.model import load_model
from lockstep.engine.planned import planned
from lockstep.engine.request import SamplingParams, check_params, check_single, token_list
from lockstep.engine.speculation.drafts import MODEL, SOURCES
from lockstep.models.checkpoint import end_of_sequence_ids, open_checkpoint
from lockstep.models.pooling import default_pooling
from lockstep.progress import OnProgress
from lockstep.ptq.solved import Solved
from lockstep.text.tokenizer.tokenizer import (
    Tokenizer,
    answer_detokenizer,
    check_can_chat,
    find_tokenizer,
    has_tokenizer,
)
from lockstep.weights.content import ContentHash
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import PackedStore

if TYPE_CHECKING:
    from lockstep.text.conversation import ChatModel


class LLM:
    """A model for offline inference: loads weights, tokenizer and engine, and generates text on this machine's CPU.

        from lockstep import LLM, SamplingParams

        llm = LLM("Qwen/Qwen3-0.6B")
        outputs = llm.generate(["The capital of France is"], SamplingParams(max_tokens=16, temperature=0.8, seed=1))
        print(outputs[0].text, outputs[0].finish_reason)
        print(llm.chat([{"role": "user", "content": "Hello!"}]).text)

    Model. model: a Hugging Face folder, a GGUF file, a name on the Hugging Face hub (org/model, org/model:Q8_0), of
    Ollama (ollama:NAME) or LM Studio (lmstudio:MAKER/NAME), or None for the bundled model. weights: the format of the
    linear layers: "auto" (as stored), "f32", "bf16", "q8_0" or "q4_0". kv_dtype: of the KV cache: "bf16", "f32" or
    "q8". plan: a file with a solved quantization plan for this model (`lockstep ptq`), which the model then runs with;
    weights and kv_dtype are f32 then. needs_chat: refuse a model without a chat template. generation_config: the source
    of sampling_defaults: "auto" (the model's own), "none", or a folder with a generation_config.json. verify_weights:
    read all weights, packed ones too, and check their hashes once more.

    Sizes. max_context: tokens of a prompt and its answer together, at most kv_tokens; None: the model's own limit, as
    far as the KV cache has room (in kv_tokens, or in half of the memory that is free beside the weights); the
    attribute `context` has the ContextSize that resulted. max_requests: sequences that decode together, at most.
    max_step_tokens: tokens that one forward pass computes, at most; longer prompts are prefilled in chunks. kv_tokens:
    tokens of KV cache over all requests. threads: None: one for each core.

    Prefix caching. prefix_cache: whether a request reuses the KV cache of earlier requests with the same first tokens.
    cache_dir: a folder of at most cache_dir_bytes bytes that keeps cached prefixes across restarts.

    Speculative decoding. speculate, draft: see EngineOptions; speculate may also name (as `model` does) a smaller model
    of the same vocabulary, which then drafts; weights, kv_dtype and max_context hold for both models.

    Debugging and progress. ops: {op kind: implementation} that replace entries of the backend, such as {"linear":
    "reference"}. progress: called with (what, done, total) while weights are hashed and packed and
    kernels are compiled.

    ValueError, in one sentence, for a model that cannot be loaded or an option that is not allowed.
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
        progress: OnProgress | None = None,
        prefix_cache: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_dir_bytes: int = 8 << 30,
        speculate: str = "off",
        draft: int | None = None,
        plan: str | os.PathLike[str] | None = None,
        needs_chat: bool = False,
        generation_config: str = "auto",
        verify_weights: bool = False,
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
            sources = ", ".join(SOURCES)
            raise ValueError(f"speculate: expected {sources} or the name of a smaller model, got {speculate!r:.80}")
        if speculate not in SOURCES:
            tokenizer = self.tokenizer if self.has_tokenizer else None
            load_options = LoadOptions(weights, kv_dtype, max_context, progress, verify_weights)
            self._draft, speculate = load_draft(speculate, tuple(SOURCES), loaded, tokenizer, load_options), MODEL
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
        new_detokenizer = functools.partial(answer_detokenizer, self.tokenizer) if self.has_tokenizer else None
        eos_ids = end_of_sequence_ids(checkpoint, self.tokenizer.eos_ids if self.has_tokenizer else ())
        self.engine = Engine(self.model, options, ops, eos_ids, new_detokenizer, progress, self._draft)
        try:
            for read in (checkpoint, self._draft.checkpoint) if self._draft else (checkpoint,):
                read.check_unchanged()  # all weights have been read
        except ValueError:
            self.engine.close()
            raise
        for store in (self._store, self._draft.store) if self._draft else (self._store,):
            store.warn_not_kept()

    @functools.cached_property
    def sampling_defaults(self) -> dict[str, Any]:
        """{field of SamplingParams: value} that the model's makers recommend, from its generation_config.json or GGUF
        metadata. `chat` and `default_params` start from them, `generate` does not. The first access logs a warning for
        each recommended setting that is not supported."""
        return self._makers_sampling()

    def makers_sampling(self) -> dict[str, Any]:
        """As `sampling_defaults`, but without warnings, for callers that do not sample with them."""
        return self._makers_sampling(warn=lambda *_: None)

    @property
    def content(self) -> ContentHash:
        """The SHA-256 of the model's weight files and config, by which packed weights and cached prefixes are named."""
        return self._checkpoint.content

    @property
    def num_bytes_not_kept(self) -> int:
        """Bytes of packed weights that could not be written to the cache folder: the next start packs them again."""
        return self._store.num_bytes_not_kept

    @property
    def max_context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.model.max_context

    @property
    def max_requests(self) -> int:
        """The most sequences that are computed in one step; further requests wait in the queue."""
        return self.engine.limits.max_requests

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
        return find_tokenizer(self.path, self._checkpoint.metadata)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint has a tokenizer; without one, prompts are token ids and answers have no text."""
        return has_tokenizer(self.path, self._checkpoint.metadata)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a string is tokenized, with BOS where the model expects it; token ids are returned as
        they are."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_list(prompt)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a conversation, rendered with the checkpoint's chat template.

        messages: a list of {"role", "content"}. tools: JSON schemas of functions as in OpenAI's API. options: variables
        of the template, such as enable_thinking. Without tools, messages that the template cannot show are rewritten
        (text/templates/fallbacks.py); with tools, the template gets all messages unchanged. ValueError if there is no
        chat template, or it refuses the conversation.
        """
        if tools is not None:
            return self.tokenizer.encode_chat(messages, tools, **options)
        return self.tokenizer.encode(self._without_tools(messages, **options), add_special_tokens=False)

    @functools.cached_property
    def _without_tools(self) -> Callable[..., str]:
        from lockstep.text.templates.beside_calls import prompts_without_tools  # grammars take a while to import

        return prompts_without_tools(self.tokenizer)

    def default_params(self, **fields: Any) -> SamplingParams:
        """SamplingParams with the values that the model's makers recommend, except for the given fields.

        Where neither sets a temperature it is 1, as in OpenAI's API.
        """
        return SamplingParams(**{"temperature": 1.0, **self.sampling_defaults, **fields})

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        prediction: Prompt | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        **variables: Any,
    ) -> Completion:
        """The model's answer to a conversation: a list of {"role", "content"}, as OpenAI's API has them.

        params: None: `default_params` with as many tokens as the context has room for. prediction: see `generate`.
        tools: functions that the model may call, as in OpenAI's API. With tool_choice "required" or a name, calls are
        constrained to their schemas; with "auto" they are where the model marks a call by one token of its own. Schemas
        that cannot be enforced are refused only for tools that are "strict".
        tool_choice: "auto", "required", "none" or a tool's name. schema, regex, grammar: see `generate`. variables: of
        the chat template, such as enable_thinking. The Completion's `content`, `reasoning` and `tool_calls` are what
        its `text` consists of. ValueError if the model has no chat template or the template refuses, and for tools or
        a form that cannot be enforced.
        """
        from lockstep import constrained  # grammars take a while to import

        form, num_samples = constrained.grammar_of(schema, regex, grammar), 1
        if params is not None:
            check_params(params)
            num_samples = params.n
            if tools or form:
                constrained.check_no_mask(params, form[0] if form else "tools")
        asked = constrained.conversation(messages, tools, tool_choice, form, variables)
        prepared = self._chat_model.prepare(asked, num_samples)
        if params is None:
            params = self.default_params(max_tokens=max(1, self.max_context - len(prepared.ids)))
        params = constrained.with_options(params, prepared.options)
        [answer] = self.generate([prepared.ids], params, [prediction])
        return constrained.parse_answer(answer, prepared.new_parser)

    @functools.cached_property
    def _chat_model(self) -> "ChatModel":
        from lockstep.text.conversation import ChatModel  # grammars take a while to import

        return ChatModel(self.tokenizer, self.engine.eos_ids, self.vocab_size, self.max_context)

    def start(
        self, prompt: Prompt, params: SamplingParams = SamplingParams(), prediction: Prompt | None = None
    ) -> Stream:
        """Queues one prompt without running it; returns its Stream, which advances with `engine.step()`.

        prediction: see `generate`. ValueError for a prompt that cannot run, or params with n > 1.
        """
        check_single(params)
        return self.start_samples(prompt, params, prediction)[0]

    def start_samples(self, prompt: Prompt, params: SamplingParams, prediction: Prompt | None = None) -> list[Stream]:
        """Queues the `params.n` samples of a prompt; returns a Stream for each. prediction: see `generate`."""
        ids = self.encode(prompt)
        requests = self.engine.add_samples(ids, params, prediction=self._prediction_ids(prediction))
        return [Stream(request) for request in requests]

    def _prediction_ids(self, prediction: Prompt | None) -> Sequence[int]:
        """Token ids of a prediction."""
        if not isinstance(prediction, str):
            return () if prediction is None else prediction
        try:
            return self.tokenizer.encode(prediction, add_special_tokens=False, max_tokens=self.max_context)
        except ValueError as error:
            raise ValueError(f"prediction: {error}") from None

    def stream(
        self, prompt: Prompt, params: SamplingParams = SamplingParams(), prediction: Prompt | None = None
    ) -> Iterator[Stream]:
        """Yields the Stream of one prompt after every token: print its `new_text` each time.

        Several tokens may come at once, where drafts were accepted or another call has run the engine's steps.
        prediction: see `generate`. Closing the generator cancels the request.
        """
        stream, seen = self.start(prompt, params, prediction), (0, None)
        try:
            while seen[1] is None:
                state = len(stream.request.output_ids), stream.request.finish_reason
                if state == seen:
                    self.engine.step()
                    continue
                seen = state
                stream.advance()
                yield stream
        finally:
            self.engine.cancel(stream.request)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        prediction: str | Sequence[Prompt | None] | None = None,
        *,
        schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> list[Completion]:
        """Completes all prompts (strings or lists of token ids) in one batch; returns a Completion for each, in order.

        params: one SamplingParams for all prompts, or a list with one for each. The default is greedy decoding of 128
        tokens, whatever the model's makers recommend (`default_params` has that). With n > 1 the Completion is the
        first sample's, and its `samples` are all n. prediction: a text that the answers are likely to repeat in large
        part, or a list with one (text, token ids or None) for each prompt: with speculate "auto" or "lookup" the tokens
        that match are decoded faster. schema (a JSON schema or its text), regex (Rust's syntax, the whole answer) or
        grammar (Lark or GBNF) constrain every answer; a schema's keyword that cannot be enforced is refused. ValueError
        for a prompt that cannot run; then none of them runs.
        """
        prompts = prompt_list(prompts)
        each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params: expected one or {len(prompts)}, got {len(each)}")
        predictions = list(prediction) if isinstance(prediction, (list, tuple)) else [prediction] * len(prompts)
        if len(predictions) != len(prompts):
            raise ValueError(f"prediction: expected one text or a list of {len(prompts)}, got {len(predictions)}")
        if (schema, regex, grammar) != (None, None, None):
            from lockstep import constrained  # grammars take a while to import

            form = constrained.grammar_of(schema, regex, grammar)
            each = [constrained.with_grammar(one, form, self._chat_model.grammars) for one in each]
        ended = run_all(self, prompts, each, predictions)
        return [completion(*[stream.request for stream in streams]) for streams in ended]

    @functools.cached_property
    def pooling(self) -> str:
        """The pooling of embeddings that the model's makers recommend: "mean" or "last", which is the default."""
        return default_pooling(self.path, self._checkpoint.config)

    def embed(
        self, prompts: Prompt | Iterable[Prompt], pooling: str | None = None, normalize: bool = True
    ) -> np.ndarray:
        """Embeddings of prompts (strings or lists of token ids): float32 [number of prompts, D].

        A row has the same bits whichever prompts are computed beside it. It comes from the hidden states after the
        model's final norm: pooling "last": the last token's; "mean": the mean over all tokens; None: `self.pooling`.
        normalize: scale each row to length 1. ValueError for a prompt that cannot run, or whose embedding has numbers
        that are not finite.
        """
        prompts, params = prompt_list(prompts), SamplingParams(pooling=self.pooling if pooling is None else pooling)
        ended = run_all(self, prompts, [params] * len(prompts), [None] * len(prompts))
        error = next((stream.request.error for streams in ended for stream in streams if stream.request.error), None)
        if error is not None:
            raise ValueError(error)
        rows = [pool.embedding(normalize) for streams in ended if (pool := streams[0].request.pool) is not None]
        return np.stack(rows) if rows else np.zeros((0, self.hidden_size), np.float32)

    def close(self) -> None:
        """Stops the engine's threads. The model cannot be used after that. The end of `with LLM() as llm:` does it."""
        try:
            self.engine.close()
        finally:
            if "_chat_model" in self.__dict__:
                self._chat_model.grammars.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Name, family, formats of weights and KV cache, size of the packed weights, context."""
        formats = ", ".join(self.model.main_formats)
        return (
            f"LLM({self.path.name!r}, {self.model.config.model_type}, weights {formats}, KV cache "
            f"{self.model.kv_dtype}, {self._store.num_bytes / 1e6:.0f} MB, context {self.max_context})"
        )
