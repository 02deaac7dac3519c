"""/v1/completions: texts go on."""
from typing import Annotated

from pydantic import Field
from starlette.routing import Route

from lockstep.serve.http.body import Fields, shown
from lockstep.serve.http.completion_answer import Answer
from lockstep.serve.http.encode import json_response
from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.forms import FormFields, masks
from lockstep.serve.http.job import Generates
from lockstep.serve.http.sampling import Count, SamplingFields, sampling_params
from lockstep.serve.http.sse import EventStream

DEFAULT_TOKENS = 16


class StreamOptions(Fields):
    """What a stream has besides text."""

    include_usage: bool = False


class CompletionFields(SamplingFields, FormFields):
    """The body of a request."""

    model: str | None = None
    prompt: object
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool = True
    return_token_ids: bool = False


def routes(service):
    """The routes of this module."""
    async def complete(job):
        fields = await job.read(CompletionFields)
        service.check_model(fields.model)
        _refuse_unsupported(fields, service.limits)
        texts, ids = await job.prepare(read_prompts, service, fields.prompt, fields.add_special_tokens)
        each_mask = await job.offload(masks, service, fields, len(ids)) if fields.has_form else [None] * len(ids)
        answer = Answer(job, fields, texts)
        await job.start([(each, _params(fields, service, len(each), mask)) for each, mask in zip(ids, each_mask)],
                        fields.cache_salt or "")
        if fields.stream:
            return EventStream(job, answer.events())
        await job.finished()
        return json_response(answer.whole() if fields.logprobs is None else await job.offload(answer.whole))

    return [Route("/v1/completions", Generates(service, complete), methods=["POST"])]


def _refuse_unsupported(fields, limits):
    if fields.suffix:
        raise bad_request("suffix: filling in the middle is not supported, expected none", "suffix", "unsupported")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise bad_request(f"best_of: expected none or the value of n, got {fields.best_of}", "best_of", "unsupported")
    if fields.logprobs is not None and fields.logprobs > limits.max_logprobs:
        raise bad_request(f"logprobs: expected at most {limits.max_logprobs}, got {fields.logprobs}", "logprobs",
                          "invalid_value")


def _params(fields, service, num_prompt, mask):
    """SamplingParams of one prompt. A request for no tokens runs for one, which nobody gets to see."""
    room = max(1, service.llm.model.max_context - num_prompt)
    max_tokens = min(DEFAULT_TOKENS, room) if fields.max_tokens is None else max(1, fields.max_tokens)
    wants_prompt = fields.echo and fields.logprobs is not None
    return sampling_params(fields, service.limits, max_tokens, service.llm.sampling_defaults, logprobs=fields.logprobs,
                           logits_mask=mask, prompt_logprobs=fields.logprobs if wants_prompt else None)


# ---------------------------------------------------------------- prompts

def read_prompts(service, prompt, add_special_tokens):
    """(texts, lists of token ids) of a prompt in any of its four forms; the text of ids is None. ApiError 400."""
    prompts = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if len(prompts) > service.limits.max_prompts:
        raise bad_request(f"prompt: expected at most {service.limits.max_prompts} prompts, got {len(prompts)}",
                          "prompt", "invalid_value")
    texts = [each if isinstance(each, str) else None for each in prompts]
    return texts, [_ids(service, each, add_special_tokens) for each in prompts]


def _is_ids(prompt):
    return not prompt or isinstance(prompt[0], int)


def _ids(service, prompt, add_special_tokens):
    if isinstance(prompt, str):
        ids = text_tokenizer(service).encode(prompt, add_special_tokens)
    elif isinstance(prompt, list):
        ids = check_ids(service, prompt, "prompt")
    else:
        raise bad_request(f"prompt: expected a string, an array of strings, an array of token ids or an array of such "
                          f"arrays, got {shown(prompt)}", "prompt", "invalid_type")
    if not ids:
        raise bad_request("prompt: expected at least one token, got none", "prompt", "invalid_value")
    return ids


def text_tokenizer(service):
    """The tokenizer. ApiError 400 where there is none."""
    if service.tokenizer is None:
        raise bad_request("this model has no tokenizer: prompts must be arrays of token ids", "prompt", "no_tokenizer")
    return service.tokenizer


def check_ids(service, ids, where):
    """Token ids that the model has. ApiError 400 for anything else."""
    vocab = service.llm.model.config.vocab_size
    for each in ids:
        if type(each) is not int or not 0 <= each < vocab:
            raise bad_request(f"{where}: expected token ids from 0 to {vocab - 1}, got {shown(each)}", where,
                              "invalid_value")
    return ids
