"""/v1/batches: lines of a file that are answered when nobody else asks, as OpenAI's API has it."""

from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lockstep.serve.answers.json_response import json_response
from lockstep.serve.batches.desk import BatchDesk
from lockstep.serve.batches.records import listed
from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import Fields, parse_and_check_async, read_body
from lockstep.serve.routes.files import page_of, tenant_of
from lockstep.serve.service import Service

SHOWN, MOST_SHOWN = 20, 100
Endpoint = Literal[
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"
]  # those of line_reader.ENDPOINTS
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class BatchFields(Fields):
    """The body of a request."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    output_expires_after: dict | None = None


def routes(service: Service, desk: BatchDesk) -> list[Route]:
    """The routes of the batches of a BatchDesk."""

    async def create(request: Request) -> Response:
        raw = await read_body(request.receive, service.limits.body_seconds)
        fields = await parse_and_check_async(service, BatchFields, raw)
        if fields.output_expires_after is not None:
            raise wrong_field("output_expires_after", "files are kept until they are deleted", "unsupported")
        options = dict(endpoint=fields.endpoint, completion_window=fields.completion_window, metadata=fields.metadata)
        return json_response(desk.create(tenant_of(request), fields.input_file_id, options))

    async def show_all(request: Request) -> Response:
        after, limit = page_of(request, SHOWN, MOST_SHOWN)
        return json_response(listed(desk.records.of_tenant(tenant_of(request), "batch"), after, limit))

    async def show(request: Request) -> Response:
        return json_response(desk.records.get(request.path_params["name"], tenant_of(request), "batch"))

    async def cancel(request: Request) -> Response:
        return json_response(desk.cancel(request.path_params["name"], tenant_of(request)))

    return [
        Route("/v1/batches", create, methods=["POST"]),
        Route("/v1/batches", show_all, methods=["GET"]),
        Route("/v1/batches/{name}", show, methods=["GET"]),
        Route("/v1/batches/{name}/cancel", cancel, methods=["POST"]),
    ]
