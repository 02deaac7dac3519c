"""Whether the server is alive and ready, and what it has done."""

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Route

from lockstep.serve.http.encode import json_response
from lockstep.serve.http.service import Service


def routes(service: Service):
    async def health(request):
        """503 where only a restart helps."""
        trouble = service.trouble
        return json_response(dict(status="failed", reason=trouble), 503) if trouble else json_response({"status": "ok"})

    async def ready(request):
        """503 where requests should go elsewhere for now."""
        state = service.state if service.trouble is None else "failed"
        if state == "ready" and service.num_sequences >= service.most_sequences:
            state = "full"
        return json_response(dict(status=state), 200 if state == "ready" else 503)

    async def metrics(request):
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
