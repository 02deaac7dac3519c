"""/v1/completions: continuations of texts, as OpenAI's API has it."""

import time
from typing import Annotated, Any

from pydantic import Field
from starlette.routing import Route

from lockstep.serve.answers.json_response import fields_text, to_text
from lockstep.serve.answers.logprobs import LegacyLogprobs, check_prompt_logprobs, prompt_logprobs
from lockstep.serve.answers.sse import EventStream, data_event, json_answer
from lockstep.serve.errors import check_most
from lockstep.serve.fields.body import Whole
from lockstep.serve.fields.continuation import ContinueFields, continuation
from lockstep.serve.fields.prediction import predicted_ids
from lockstep.serve.fields.prompts import read_prompts
from lockstep.serve.fields.response_format import ResponseFormatFields, masks
from lockstep.serve.fields.sampling import UNTIL_FULL, MostTokens, SamplingFields, most_tokens, sampling_params
from lockstep.serve.fields.stream import ChunkEnd, StreamFields
from lockstep.serve.generation import Generation, GenerationEndpoint
from lockstep.serve.service import Service
from lockstep.serve.token_masks import combined_masks, narrowing_fields

DEFAULT_TOKENS = 16
MostTokensOrNone = Annotated[Whole, Field(ge=UNTIL_FULL)]


class CompletionFields(SamplingFields, ContinueFields, ResponseFormatFields, StreamFields):
    """The body of a request."""

    model: str | None = None
    prompt: Any
    max_tokens: MostTokensOrNone | None = None
    max_completion_tokens: MostTokensOrNone | None = None
    n_predict: MostTokensOrNone | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: MostTokens | None = None
    return_token_ids: bool | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the request asks for no token of an answer, as with max_tokens 0 and echo."""
        return most_tokens(self, 1, DEFAULT_TOKENS) == 0


def routes(service: Service):
    async def complete(generation: Generation):
        fields = await generation.read(CompletionFields)
        check_prompt_logprobs(fields)
        check_most("logprobs", fields.logprobs or 0, service.limits.max_logprobs)
        texts, ids = await generation.prepare(
            read_prompts,
            service,
            fields.prompt,
            fields.add_special_tokens is not False,
            _most_prompt(fields, service.max_context),
        )
        each_mask = [None] * len(ids)
        if fields.format_fields:
            each_mask = await generation.offload(masks, service, fields, len(ids))
        each_mask = await generation.prepare(combined_masks, service, fields, each_mask, each_mask[0] is not None)
        predicted = await generation.prepare(predicted_ids, service, fields.prediction)
        prompts = [(each, _params(fields, service, len(each), mask)) for each, mask in zip(ids, each_mask, strict=True)]
        await generation.start(
            prompts,
            fields.cache_salt or "",
            narrowing_fields(fields),
            predicted,
            await generation.prepare(continuation, service, fields, prompts),
        )
        answer = Answer(generation, fields, texts)
        if fields.stream:
            return EventStream(generation, answer.events())
        await generation.finished()
        is_quick = fields.logprobs is fields.prompt_logprobs is None
        return await json_answer(generation, answer.whole, is_quick)

    return [Route("/v1/completions", GenerationEndpoint(service, complete), methods=["POST"])]


def _most_prompt(fields, max_context):
    """How many tokens of a prompt to keep: with UNTIL_FULL as many as leave room for the answer; None: all."""
    if fields.truncate_prompt_tokens != UNTIL_FULL:
        return fields.truncate_prompt_tokens
    wanted = most_tokens(fields, max_context, DEFAULT_TOKENS)
    return max_context - (wanted if 1 <= wanted < max_context else 1)


def _params(fields, service: Service, num_prompt, mask):
    """SamplingParams of one prompt. A request for no tokens generates one, which is not shown."""
    room = max(1, service.max_context - num_prompt)
    max_tokens = max(1, most_tokens(fields, room, DEFAULT_TOKENS))
    wants_prompt = fields.echo and fields.logprobs is not None
    return sampling_params(
        fields,
        service.limits,
        max_tokens,
        service.sampling_defaults,
        logprobs=fields.logprobs,
        logits_mask=mask,
        prompt_logprobs=fields.logprobs if wants_prompt else fields.prompt_logprobs,
    )


class Answer:
    """The answer to one request. texts: the prompts; None for one that was given as token ids."""

    def __init__(self, generation: Generation, fields, texts) -> None:
        self.generation, self.fields, self._texts = generation, fields, texts
        self.tokenizer, self.is_empty = generation.service.tokenizer, fields.is_empty
        self.head = dict(
            id=f"cmpl-{generation.exchange.id}",
            object="text_completion",
            created=int(time.time()),
            model=generation.model_name,
            **generation.service.fingerprint_field,
        )

    def whole(self):
        """The response object; arrays that may be long are Parts."""
        choices = [self._choice(number, request) for number, request in enumerate(self.generation.requests)]
        return self.head | dict(choices=choices, usage=self._usage())

    def _choice(self, number, request):
        num_output = 0 if self.is_empty else len(request.output_ids)
        text = "" if self.is_empty else request.text
        reason = "length" if self.is_empty else request.finish_reason
        made = dict(index=number, text=self.echoed(number) + text, logprobs=None, finish_reason=reason)
        if self.fields.logprobs is not None:
            made["logprobs"] = LegacyLogprobs(self.tokenizer, request, bool(self.fields.echo)).whole(num_output)
        if self.fields.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(self.tokenizer, request)
        if self.fields.return_token_ids:
            made |= dict(prompt_token_ids=request.prompt_ids, token_ids=request.output_ids[:num_output])
        return made | self.generation.receipt(number)

    def echoed(self, number):
        """The prompt of a sequence where the request asks for echo, else ""."""
        if not self.fields.echo:
            return ""
        text = self._texts[number // self.fields.num_samples]
        if text is None and self.tokenizer is not None:
            return self.tokenizer.decode(self.generation.requests[number].prompt_ids)
        return text or ""

    def _usage(self):
        usage = self.generation.usage()
        if self.is_empty:
            usage |= dict(completion_tokens=0, total_tokens=usage["prompt_tokens"])
        return usage

    async def events(self):
        """Yields the chunks of a stream, the chunks of one step as one piece of bytes."""
        sequences = [Chunks(self, number) for number in range(len(self.generation.requests))]
        async for found in self.generation.tokens():
            yield b"".join([sequences[number].chunk(tokens, reason) for number, tokens, reason in found])
        if self.fields.streams_usage:
            yield data_event(self.head | dict(choices=[], usage=self._usage()))


class Chunks:
    """The chunks of one sequence. Their common fields are encoded once."""

    def __init__(self, answer, number) -> None:
        self._answer, self._number, self._request = answer, number, answer.generation.requests[number]
        self._before = f'data: {to_text(answer.head)[:-1]},"choices":[{{"index":{number},"text":'
        self._end = ChunkEnd(answer.fields, self._request)
        self._num_sent = self._request.num_given  # the client has these tokens, and before them the prompt
        self._echo = "" if self._num_sent else answer.echoed(number)
        self._logprobs = None
        if answer.fields.logprobs is not None:
            self._logprobs = LegacyLogprobs(answer.tokenizer, self._request, bool(answer.fields.echo))
            self._logprobs.skip(self._num_sent)

    def chunk(self, tokens, reason):
        """The chunk for new tokens; empty where they have no text yet and nothing else is reported."""
        if self._answer.is_empty:
            tokens, reason = [], "length"
        text, self._echo = self._echo + "".join([token.text for token in tokens]), ""
        start, self._num_sent = self._num_sent, self._num_sent + len(tokens)
        if not (text or reason or self._logprobs or self._answer.fields.return_token_ids):
            return b""
        logprobs = to_text(self._logprobs and self._logprobs.part(start, self._num_sent))
        return (
            f'{self._before}{to_text(text)},"logprobs":{logprobs},"finish_reason":{to_text(reason)}'
            f"{self._token_ids(tokens)}{self._receipt(reason)}{self._end.after(self._num_sent)}".encode("ascii")
        )

    def _receipt(self, reason) -> str:
        """The fields of the last chunk that have the receipt, if one was asked for."""
        return fields_text(self._answer.generation.receipt(self._number)) if reason else ""

    def _token_ids(self, tokens) -> str:
        if not self._answer.fields.return_token_ids:
            return ""
        return f',"token_ids":{to_text([token.id for token in tokens])}'
