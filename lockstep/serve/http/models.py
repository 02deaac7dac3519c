"""/v1/models: the one model that there is."""
from starlette.routing import Route

from lockstep.serve.http.encode import json_response
from lockstep.serve.http.errors import ApiError


def routes(service):
    """The routes of this module."""
    async def listed(request):
        return json_response({"object": "list", "data": [described(service)]})

    async def one(request):
        service.check_model(request.path_params["name"])
        return json_response(described(service))

    return [Route("/v1/models", listed), Route("/v1/models/{name:path}", one)]


def described(service):
    """The model as OpenAI describes one. ApiError 503 while it is loading."""
    if service.llm is None:
        raise ApiError(503, "the model is still loading", code="loading", retry_after=1)
    return dict(id=service.model_name, object="model", created=service.created, owned_by="lockstep",
                max_model_len=service.llm.model.max_context, system_fingerprint=service.fingerprint)
