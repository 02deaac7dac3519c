"""`LLM`: offline generation from Python."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.completion import (
    Completion,
    CompletionStream,
    NewReceipt,
    Prompt,
    Stream,
    completion,
    parse_answer,
    run_all,
    run_made,
)
from lockstep.engine.embedding import Pool
from lockstep.engine.request import SamplingParams, check_params, check_single
from lockstep.loading import LoadedModel
from lockstep.progress import OnProgress

if TYPE_CHECKING:
    from lockstep.receipts.envelope import Envelope
    from lockstep.receipts.receipt import Receipt, ReceiptOptions
    from lockstep.receipts.verdict import Verdict
    from lockstep.receipts.verify import Given, Verifier
    from lockstep.text.conversation import ChatModel, Prepared


class LLM(LoadedModel):
    """A model for offline inference: loads weights, tokenizer and engine, and generates text on this machine's CPU.

        from lockstep import LLM, SamplingParams

        llm = LLM("Qwen/Qwen3-0.6B")
        outputs = llm.generate(["The capital of France is"], SamplingParams(max_tokens=16, temperature=0.8, seed=1))
        print(outputs[0].text, outputs[0].finish_reason)
        print(llm.chat([{"role": "user", "content": "Hello!"}]).text)

    Model. model: a Hugging Face folder, a GGUF file, a name on the Hugging Face hub (org/model, org/model:Q8_0), of
    Ollama (ollama:NAME) or LM Studio (lmstudio:MAKER/NAME), or None for the bundled model. weights: the format of the
    linear layers: "auto" (as stored), "f32", "bf16", "q8_0" or "q4_0". kv_dtype: of the KV cache: "bf16", "f32" or
    "q8". rope: "short": a model whose rope has short and long factors (Phi) runs with the short ones, and a context no
    longer than they are for; "auto": its config decides. plan: a file with a solved quantization plan for this model
    (`lockstep ptq`), which the model then runs with; weights and kv_dtype are f32 then. needs_text, needs_chat: refuse
    a model without a tokenizer, or without a chat template, before anything is packed. generation_config: the source of
    sampling_defaults: "auto" (the model's own), "none", or a folder with a generation_config.json. verify_weights: read
    all weights, packed ones too, and check their hashes once more.

    Sizes. max_context: tokens of a prompt and its answer together, at most kv_tokens; None: the model's own limit, as
    far as the KV cache has room (in kv_tokens, or in half of the memory that is free beside the weights); the
    attribute `context` has the ContextSize that resulted. max_requests: sequences that decode together, at most.
    max_step_tokens: tokens that one forward pass computes, at most; longer prompts are prefilled in chunks. kv_tokens:
    tokens of KV cache over all requests. threads: at most one for each core; None: one for each. numa: "interleave"
    spreads weights and caches over the memory of all NUMA nodes; "off". num_engines, claims_kv: see EngineOptions.
    packs_lazily: pack experts when a step first needs them; `finish_packing` packs those that are left.

    Prefix caching. prefix_cache: whether a request reuses the KV cache of earlier requests with the same first tokens.
    cache_dir: a folder of at most cache_dir_bytes bytes that keeps cached prefixes across restarts, and which several
    processes may share.

    Speculative decoding. speculate, draft: see EngineOptions; speculate may also name (as `model` does) a smaller model
    of the same vocabulary, which then drafts; weights, kv_dtype and max_context hold for both models.

    Debugging and progress. ops: {op kind: implementation} that replace entries of the backend, such as {"linear":
    "reference"}. progress: True: work that takes over a second (downloading, reading, packing and loading weights,
    compiling kernels, and `generate` and `embed` of several prompts) shows bars on standard error, or, where that is no
    terminal, a line every 10 seconds. False: nothing is shown. A function, for loading alone: called as progress(kind,
    done, total), from any thread, with kind "compiling" (then done and total are kernels), "downloading", "reading",
    "packing" or "loading" (bytes of weights; total may be None). on_tokenizer: called with the tokenizer, if there is
    one, before weights are packed.

    ValueError, in one sentence, for a model that cannot be loaded or an option that is not allowed. Threads may share
    an LLM: their requests run in the same steps. A forked child process may not use it.
    """

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """Token ids of the prompt that `chat` makes of a conversation and tools, with the checkpoint's chat template.

        messages, tools, variables: see `chat`. Messages that the template cannot show are rewritten
        (text/templates/fallbacks.py). ValueError if there is no chat template, or it refuses the conversation.
        """
        from lockstep import constrained  # grammars take a while to import

        asked = constrained.conversation(messages, tools, "auto", None, variables)
        return self.tokenizer.encode(self.chat_model.prompt(asked), add_special_tokens=False)

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
        output_ids: Sequence[Any] | None = None,
        receipt: "bool | ReceiptOptions" = False,
        **variables: Any,
    ) -> Completion:
        """The model's answer to a conversation: a list of {"role", "content"}, as OpenAI's API has them.

        params: None: `default_params` with as many tokens as the context has room for. prediction: see `generate`.
        tools: functions that the model may call, as in OpenAI's API. With tool_choice "required" or a name, calls are
        constrained to their schemas; with "auto" they are where the model marks a call by one token of its own. A
        schema that cannot be enforced is refused if its tool is "strict"; else what can be of it is enforced, and a
        warning is logged.
        tool_choice: "auto", "required", "none" or a tool's name. schema, regex, grammar: see `generate`. variables: of
        the chat template, such as enable_thinking. The Completion's `content`, `reasoning` and `tool_calls` are what
        its `text` consists of; with calls, an answer that stops by itself has the finish_reason "tool_calls".
        output_ids: the token ids of the answer so far, from which it goes on; receipt: see `generate`.
        ValueError if the model has no chat template or the template refuses, and for tools or a form that cannot be
        enforced; Busy, which is a RuntimeError, if the processes for templates and grammars get no processor time.
        """
        form = dict(schema=schema, regex=regex, grammar=grammar)
        prepared, params = self._asked(messages, params, tools, tool_choice, form, variables)
        [answer] = self.generate([prepared.ids], params, [prediction], output_ids=[output_ids], receipt=receipt)
        return parse_answer(answer, prepared.new_parser)

    def stream_chat(
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
        output_ids: Sequence[Any] | None = None,
        receipt: "bool | ReceiptOptions" = False,
        **variables: Any,
    ) -> CompletionStream:
        """As `chat`, but a CompletionStream: its chunks have `content` and `reasoning`, its `completion` tool calls."""
        form = dict(schema=schema, regex=regex, grammar=grammar)
        prepared, params = self._asked(messages, params, tools, tool_choice, form, variables)
        make = self.new_receipt(params, receipt)
        request = self.start(prepared.ids, params, prediction, output_ids, receipt=make is not None).request
        return CompletionStream(self.engine, request, prepared.new_parser, make)

    def _asked(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str,
        form: Mapping[str, Any],
        variables: Mapping[str, Any],
    ) -> "tuple[Prepared, SamplingParams]":
        """A conversation that is ready to run, and its params."""
        from lockstep import constrained  # grammars take a while to import

        grammar, num_samples = constrained.grammar_of(**form), 1
        if params is not None:
            check_params(params)
            num_samples = params.n
            if tools or grammar:
                constrained.check_no_mask(params, grammar[0] if grammar else "tools")
        asked = constrained.conversation(messages, tools, tool_choice, grammar, variables)
        for tool in asked.tools.callable:
            self._checked_tools |= constrained.check_schema(tool, self.chat_model.grammars, self._checked_tools)
        prepared = self.chat_model.prepare(asked, num_samples)
        if params is None:
            params = self.default_params(max_tokens=max(1, self.max_context - len(prepared.ids)))
        return prepared, constrained.with_options(params, prepared.options)

    @functools.cached_property
    def _checked_tools(self) -> set[str]:
        """The schemas of tools, as JSON text, about which nothing more is to be said."""
        return set()

    @functools.cached_property
    def chat_model(self) -> "ChatModel":
        """What makes prompts and masks of conversations, and grammars into masks."""
        from lockstep.text.conversation import ChatModel  # grammars take a while to import

        return ChatModel(self.tokenizer, self.engine.eos_ids, self.vocab_size, self.max_context)

    def start(
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),
        prediction: Prompt | None = None,
        output_ids: Sequence[Any] | None = None,
        *,
        receipt: bool = False,
    ) -> Stream:
        """Queues one prompt without running it; returns its Stream, which advances with `engine.step()`.

        prediction, output_ids: see `generate`; receipt: see `Engine.make`. ValueError for a prompt that cannot run, or
        params with n > 1.
        """
        check_single(params)
        return self.start_samples(prompt, params, prediction, output_ids, receipt=receipt)[0]

    def start_samples(
        self,
        prompt: Prompt,
        params: SamplingParams,
        prediction: Prompt | None = None,
        output_ids: Sequence[Any] | None = None,
        *,
        receipt: bool = False,
    ) -> list[Stream]:
        """Queues the `params.n` samples of a prompt; returns a Stream for each. prediction, output_ids: see
        `generate`; receipt: see `Engine.make`."""
        known = dict(prediction=self._prediction_ids(prediction), output_ids=() if output_ids is None else output_ids)
        requests = self.engine.add_samples(self.encode(prompt), params, receipt=receipt, **known)
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
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),
        prediction: Prompt | None = None,
        *,
        schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        output_ids: Sequence[Any] | None = None,
        receipt: "bool | ReceiptOptions" = False,
    ) -> CompletionStream:
        """The answer to one prompt as a CompletionStream: an iterator of chunks, whose `text` is what is new.

        prediction, schema, regex, grammar, output_ids, receipt: see `generate`; tokens of output_ids are in no chunk.
        Leaving the loop over the stream cancels the request.
        ValueError for a prompt that cannot run, or params with n > 1.
        """
        check_single(params)
        [params] = self.held_to([params], schema=schema, regex=regex, grammar=grammar)
        make = self.new_receipt(params, receipt)
        request = self.start(prompt, params, prediction, output_ids, receipt=make is not None).request
        return CompletionStream(self.engine, request, new_receipt=make)

    def held_to(self, params: list[SamplingParams], **form: Any) -> list[SamplingParams]:
        """The params of several prompts with masks that hold the answers to a form, see `generate`."""
        if all(value is None for value in form.values()):
            return params
        from lockstep import constrained  # grammars take a while to import

        grammar = constrained.grammar_of(**form)
        return constrained.with_grammar(params, grammar, self.chat_model.grammars, self.max_requests)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        prediction: str | Sequence[Prompt | None] | None = None,
        *,
        schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        output_ids: Sequence[Any] | None = None,
        progress: bool | OnProgress | None = None,
        receipt: "bool | ReceiptOptions" = False,
    ) -> list[Completion]:
        """Completes all prompts (strings or lists of token ids) in one batch; returns a Completion for each, in order.

        params: one SamplingParams for all prompts, or a list with one for each. The default is greedy decoding of 128
        tokens, whatever the model's makers recommend (`default_params` has that). With n > 1 the Completion is the
        first sample's, and its `samples` are all n. prediction: a text that the answers are likely to repeat in large
        part, or a list with one (text, token ids or None) for each prompt: with speculate "auto" or "lookup" the tokens
        that match are decoded faster. schema (a JSON schema or its text), regex (Rust's syntax, the whole answer) or
        grammar (Lark or GBNF) constrain every answer; a schema's keyword that cannot be enforced is refused.
        output_ids: tokens of the answers that are known, for each prompt a list of token ids (for n samples a list of
        such lists) or None; of a single prompt, its token ids alone. The answers go on from them as if nothing had come
        between, and have them in their Completions, with the log-probabilities computed anew; they count for
        max_tokens. Tokens that cannot be the beginning of an answer are a ValueError. progress: True or False, as in
        LLM, which is the default where it was True or False; or a function, called with ("generating", answers that
        have ended, all answers). receipt: whether each Completion has a receipt, which `verify` checks for a fraction
        of what the answer cost; ReceiptOptions say what is in it. ValueError for a prompt that cannot run; then none of
        them runs.
        """
        prompts = prompt_list(prompts)
        each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params: expected one or {len(prompts)}, got {len(each)}")
        predictions = list(prediction) if isinstance(prediction, (list, tuple)) else [prediction] * len(prompts)
        if len(predictions) != len(prompts):
            raise ValueError(f"prediction: expected one text or a list of {len(prompts)}, got {len(predictions)}")
        known = known_lists(output_ids, len(prompts))
        each = self.held_to(each, schema=schema, regex=regex, grammar=grammar)
        shown = self._shows_progress if progress is None else progress
        makers = [self.new_receipt(own, receipt) for own in each]
        ended = run_all(self, prompts, each, predictions, known, shown, receipt=receipt is not False)
        return [
            completion(*[stream.request for stream in streams], new_receipt=make)
            for streams, make in zip(ended, makers, strict=True)
        ]

    # ------------------------------------------------------------ receipts

    def new_receipt(self, params: SamplingParams, options: "bool | ReceiptOptions") -> NewReceipt | None:
        """What makes the receipts of a prompt's samples; None where none are asked for. ValueError for params of which
        no receipt can be made."""
        if options is False:
            return None
        from lockstep.receipts import receipt  # grammars take a while to import

        chosen = receipt.check_options(options)
        check_params(params)
        receipt.check_receivable(params)
        return lambda request, sample: receipt.make_receipt(self.model_part, request, params, sample, chosen)

    @functools.cached_property
    def verifier(self) -> "Verifier":
        """What verifies receipts with this model."""
        from lockstep.receipts.verify import Verifier

        return Verifier(self.model_part, self.engine, lambda: self.chat_model.grammars if self.has_tokenizer else None)

    def verify(self, receipt: "Receipt | Envelope | bytes | str", given: "Given | None" = None) -> "Verdict":
        """Verifies a receipt (or its JSON text) with this model: computes prompt and answer anew in one prefill.

        given: what the receipt leaves out or hides, such as the prompt's token ids. The Verdict's `is_true` says
        whether the answer is this model's, bit for bit; its `reason` says what is wrong, or why it cannot be checked
        here. No signature is checked, see `Envelope.is_signed_by`. ReceiptError, a ValueError, for what is no receipt.
        """
        from lockstep.receipts.receipt import statement_of
        from lockstep.receipts.verify import check_given

        verification = self.verifier.begin(statement_of(receipt), check_given(given))
        if verification.request is not None:
            run_made(self.engine, [verification.request])
        return verification.finish()

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
        each, none, shown = [params] * len(prompts), [None] * len(prompts), self._shows_progress
        ended = run_all(self, prompts, each, none, none, shown, "embedding")
        error = next((stream.request.error for streams in ended for stream in streams if stream.request.error), None)
        if error is not None:
            raise ValueError(error)
        rows = [pool.embedding(normalize) for streams in ended if isinstance(pool := streams[0].request.pool, Pool)]
        return np.stack(rows) if rows else np.zeros((0, self.hidden_size), np.float32)

    def close(self) -> None:
        """Ends the engine's threads and the worker processes. The model cannot be used after that. The end of `with
        LLM() as llm:` does it."""
        if "chat_model" in self.__dict__:
            self.chat_model.grammars.close()
        super().close()


def known_lists(output_ids: Any, num_prompts: int) -> list[Any]:
    """For each prompt the tokens from which its answer goes on; None for those that begin anew. output_ids: None, or a
    list with one for each prompt; for a single prompt, its token ids alone. ValueError for anything else."""
    if output_ids is None:
        return [None] * num_prompts
    try:
        listed = list(output_ids)
    except TypeError:
        raise ValueError(f"output_ids: expected a list of lists of token ids, got {output_ids!r:.80}") from None
    if num_prompts == 1 and not any(each is None or isinstance(each, Iterable) for each in listed):
        return [listed]
    if len(listed) != num_prompts:
        expected = f"expected a list of token ids or None for each of {num_prompts} prompts"
        raise ValueError(f"output_ids: {expected}, got {len(listed)}")
    return listed


def prompt_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """The prompts as a list; a single string becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    listed: Any = prompts
    try:
        if isinstance(prompts, (bytes, bytearray)):  # whose items would be taken for token ids
            raise TypeError
        return list(listed)
    except TypeError:
        raise ValueError(f"prompts: expected text or a list of prompts, got {prompts!r:.80}") from None
