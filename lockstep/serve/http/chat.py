"""/v1/chat/completions: a conversation goes on."""
from starlette.routing import Route

from lockstep.serve.http import talk
from lockstep.serve.http.chat_answer import Answer
from lockstep.serve.http.chat_fields import ChatFields, conversation
from lockstep.serve.http.encode import json_response
from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.job import Generates
from lockstep.serve.http.sse import EventStream


def routes(service):
    """The routes of this module."""
    async def chat(job):
        fields = await job.read(ChatFields)
        service.check_model(fields.model)
        logprobs = _logprobs(fields, service.limits)
        max_tokens = fields.max_completion_tokens or fields.max_tokens
        new_parser = await talk.start(job, fields, lambda: conversation(fields), max_tokens, logprobs)
        answer = Answer(job, fields, new_parser)
        if fields.stream:
            return EventStream(job, answer.events())
        await job.finished()
        is_quick = logprobs is None and not fields.tools
        return json_response(answer.whole() if is_quick else await job.offload(answer.whole))

    return [Route("/v1/chat/completions", Generates(service, chat), methods=["POST"])]


def _logprobs(fields, limits):
    """How many alternatives to report for each token; None for no log-probabilities."""
    if fields.top_logprobs and not fields.logprobs:
        raise bad_request("top_logprobs: expected logprobs to be true, too", "top_logprobs", "invalid_value")
    if (fields.top_logprobs or 0) > limits.max_logprobs:
        raise bad_request(f"top_logprobs: expected at most {limits.max_logprobs}, got {fields.top_logprobs}",
                          "top_logprobs", "invalid_value")
    return (fields.top_logprobs or 0) if fields.logprobs else None
