"""/health, /ready, /metrics, /version and /v1/models: the state of the server, its metrics, and its one model."""

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Route

from lockstep import __version__
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.serve.answers.json_response import json_response
from lockstep.serve.service import Service


def routes(service: Service):
    async def health(request):
        """503 where only a restart helps."""
        trouble = service.trouble
        return json_response(dict(status="failed", reason=trouble), 503) if trouble else json_response({"status": "ok"})

    async def ready(request):
        """503 where requests should go elsewhere for now, with Retry-After where it helps to wait."""
        state, reason, seconds = service.readiness
        body = dict(status=state) | ({} if reason is None else dict(reason=reason))
        made = json_response(body, 200 if state == "ready" else 503)
        if seconds is not None:
            made.headers["retry-after"] = str(seconds)
        return made

    async def version(request):
        return json_response(dict(version=__version__, numerics=NUMERICS, **service.fingerprint_field))

    async def metrics(request):
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def listed(request):
        """The model once for each of its names."""
        names = service.names or [service.model_name]
        return json_response({"object": "list", "data": [described(service, name) for name in names]})

    async def one(request):
        return json_response(described(service, service.name_in_answers(request.path_params["name"])))

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/version", version),
        Route("/v1/models", listed),
        Route("/v1/models/{name:path}", one),
    ]


def described(service: Service, name):
    """OpenAI's model object for the model under one of its names. ApiError 503 while the model is loading."""
    service.check_loaded()
    return dict(
        id=name,
        object="model",
        created=service.created,
        owned_by="lockstep",
        max_model_len=service.max_context,
        **service.fingerprint_field,
    )
