"""/v1/completions: a text goes on."""
from starlette.responses import Response
from starlette.routing import Route

from lockstep.serve.http.encode import to_json
from lockstep.serve.http.job import Generates
from lockstep.serve.http.sampling import SamplingFields, sampling_params


class CompletionFields(SamplingFields):
    """The body of a request."""

    model: str | None = None
    prompt: str
    max_tokens: int | None = None


def routes(service):
    """The routes of this module."""
    async def complete(job):
        fields = await job.read(CompletionFields)
        service.check_model(fields.model)
        ids = await job.offload(service.tokenizer.encode, fields.prompt)
        params = sampling_params(fields, service.limits, fields.max_tokens or 16)
        await job.start([(ids, params)], fields.cache_salt or "")
        done = await job.finished()
        choices = [dict(index=i, text=r.text, finish_reason=r.finish_reason, logprobs=None) for i, r in enumerate(done)]
        return Response(to_json(dict(object="text_completion", choices=choices, usage=job.usage())),
                        media_type="application/json")

    return [Route("/v1/completions", Generates(service, complete), methods=["POST"])]
