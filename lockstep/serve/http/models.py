"""/v1/models: the one model that there is, once for each of its names."""

from starlette.routing import Route

from lockstep.serve.http.encode import json_response
from lockstep.serve.http.service import Service


def routes(service: Service):
    async def listed(request):
        names = service.names or [service.model_name]
        return json_response({"object": "list", "data": [described(service, name) for name in names]})

    async def one(request):
        return json_response(described(service, service.name_in_answers(request.path_params["name"])))

    return [Route("/v1/models", listed), Route("/v1/models/{name:path}", one)]


def described(service: Service, name):
    """The model under one of its names, as OpenAI describes one. ApiError 503 while it is loading."""
    service.check_loaded()
    return dict(
        id=name,
        object="model",
        created=service.created,
        owned_by="lockstep",
        max_model_len=service.max_context,
        **service.fingerprint_field,
    )
