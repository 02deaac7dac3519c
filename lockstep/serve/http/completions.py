"""/v1/completions: texts go on."""

from typing import Annotated, Any

from pydantic import Field
from starlette.routing import Route

from lockstep.serve.http.body import Whole
from lockstep.serve.http.completion_answer import Answer
from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.forms import FormFields, masks
from lockstep.serve.http.job import Generates, Job
from lockstep.serve.http.limits import Limits
from lockstep.serve.http.pieces import json_answer
from lockstep.serve.http.prompt_logprobs import check_prompt_logprobs
from lockstep.serve.http.prompts import read_prompts
from lockstep.serve.http.sampling import UNTIL_FULL, MostTokens, SamplingFields, most_tokens, sampling_params
from lockstep.serve.http.service import Service
from lockstep.serve.http.sse import EventStream
from lockstep.serve.http.stream_fields import StreamFields
from lockstep.serve.http.token_masks import UntilComplete, narrowing, token_mask

DEFAULT_TOKENS = 16
MOST_TOKENS = ("n_predict", "max_completion_tokens", "max_tokens")  # names of the same, the first that is given counts
MostTokensOrNone = Annotated[Whole, Field(ge=UNTIL_FULL)]


class CompletionFields(SamplingFields, FormFields, StreamFields):
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
        """Whether no token of an answer is wanted."""
        return most_tokens(self, MOST_TOKENS, 1, DEFAULT_TOKENS) == 0


def routes(service: Service):
    """The routes of this module."""

    async def complete(job: Job):
        fields = await job.read(CompletionFields)
        _check_logprobs(fields, service.limits)
        texts, ids = await job.prepare(
            read_prompts,
            service,
            fields.prompt,
            fields.add_special_tokens is not False,
            _most_prompt(fields, service.max_context),
        )
        each_mask = await job.offload(masks, service, fields, len(ids)) if fields.form_names else [None] * len(ids)
        has_form = each_mask[0] is not None
        if (leaves_out := await job.prepare(token_mask, service, fields)) is not None:
            each_mask = [leaves_out(mask) for mask in each_mask]
        if has_form and fields.ignore_eos:
            each_mask = [mask and UntilComplete(mask, service.loaded) for mask in each_mask]
            fields.ignore_eos = False
        answer = Answer(job, fields, texts)
        await job.start(
            [(each, _params(fields, service, len(each), mask)) for each, mask in zip(ids, each_mask, strict=True)],
            fields.cache_salt or "",
            narrowing(fields),
        )
        if fields.stream:
            return EventStream(job, answer.events())
        await job.finished()
        is_quick = fields.logprobs is fields.prompt_logprobs is None
        return await json_answer(job, answer.whole, is_quick)

    return [Route("/v1/completions", Generates(service, complete), methods=["POST"])]


def _check_logprobs(fields, limits: Limits) -> None:
    check_prompt_logprobs(fields)
    if fields.logprobs is not None and fields.logprobs > limits.max_logprobs:
        raise bad_request(
            f"logprobs: expected at most {limits.max_logprobs}, got {fields.logprobs}", "logprobs", "invalid_value"
        )


def _most_prompt(fields, max_context):
    """How many tokens of a prompt are kept: with UNTIL_FULL those that leave room for the answer; None: all."""
    if fields.truncate_prompt_tokens != UNTIL_FULL:
        return fields.truncate_prompt_tokens
    wanted = most_tokens(fields, MOST_TOKENS, max_context, DEFAULT_TOKENS)
    return max_context - (wanted if 1 <= wanted < max_context else 1)


def _params(fields, service: Service, num_prompt, mask):
    """SamplingParams of one prompt. A request for no tokens runs for one, which nobody gets to see."""
    room = max(1, service.max_context - num_prompt)
    max_tokens = max(1, most_tokens(fields, MOST_TOKENS, room, DEFAULT_TOKENS))
    wants_prompt = fields.echo and fields.logprobs is not None
    return sampling_params(
        fields,
        service.limits,
        max_tokens,
        service.loaded.sampling_defaults,
        logprobs=fields.logprobs,
        logits_mask=mask,
        prompt_logprobs=fields.logprobs if wants_prompt else fields.prompt_logprobs,
    )
