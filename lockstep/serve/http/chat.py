"""/v1/chat/completions: a conversation goes on."""

from starlette.routing import Route

from lockstep.serve.http import talk
from lockstep.serve.http.chat_answer import Answer
from lockstep.serve.http.chat_fields import ChatFields, conversation
from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.job import Generates, Job
from lockstep.serve.http.limits import Limits
from lockstep.serve.http.pieces import json_answer
from lockstep.serve.http.prompt_logprobs import check_prompt_logprobs
from lockstep.serve.http.service import Service
from lockstep.serve.http.sse import EventStream

MOST_TOKENS = ("n_predict", "max_completion_tokens", "max_tokens")  # names of the same, the first that is given counts


def routes(service: Service):
    """The routes of this module."""

    async def chat(job: Job):
        fields = await job.read(ChatFields)
        logprobs = _logprobs(fields, service.limits)
        check_prompt_logprobs(fields)
        _check_generation_prompt(fields)
        new_parser = await talk.start(
            job,
            fields,
            lambda: conversation(fields),
            MOST_TOKENS,
            logprobs=logprobs,
            prompt_logprobs=fields.prompt_logprobs,
        )
        answer = Answer(job, fields, new_parser)
        if fields.stream:
            return EventStream(job, answer.events())
        await job.finished()
        is_quick = logprobs is fields.prompt_logprobs is None and not fields.tools
        return await json_answer(job, answer.whole, is_quick)

    return [Route("/v1/chat/completions", Generates(service, chat), methods=["POST"])]


def _check_generation_prompt(fields) -> None:
    """vLLM's clients switch it off where they continue a message, which is all that it can mean here."""
    if fields.add_generation_prompt is False and not fields.continue_final_message:
        raise bad_request(
            "add_generation_prompt: expected true or none without continue_final_message, got false",
            "add_generation_prompt",
            "unsupported",
        )


def _logprobs(fields, limits: Limits):
    """How many alternatives to report for each token; None for no log-probabilities."""
    if fields.top_logprobs and not fields.logprobs:
        raise bad_request("top_logprobs: expected logprobs to be true, too", "top_logprobs", "invalid_value")
    if (fields.top_logprobs or 0) > limits.max_logprobs:
        raise bad_request(
            f"top_logprobs: expected at most {limits.max_logprobs}, got {fields.top_logprobs}",
            "top_logprobs",
            "invalid_value",
        )
    return (fields.top_logprobs or 0) if fields.logprobs else None
