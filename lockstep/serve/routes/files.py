"""/v1/files: the inputs and outputs of batches, as OpenAI's API has them."""

import asyncio

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive

from lockstep.serve.answers.json_response import json_response
from lockstep.serve.batches.desk import BatchDesk
from lockstep.serve.batches.records import listed
from lockstep.serve.errors import ApiError, wrong_field
from lockstep.serve.service import Service

MAX_FORM_FIELDS = 8
UPLOAD_SECONDS = 600.0
MOST_LISTED = 10000


def routes(service: Service, desk: BatchDesk) -> list[Route]:
    """The routes of the files of a BatchDesk."""

    async def upload(request: Request) -> Response:
        form_type = request.headers.get("content-type", "")
        if not form_type.lower().startswith("multipart/form-data"):
            raise ApiError(415, f"Content-Type: expected multipart/form-data, got {form_type[:80]!r}")
        tenant, declared = tenant_of(request), int(request.headers.get("content-length", "0"))
        with desk.uploads.taking(tenant, declared):
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    sent = Request(request.scope, steady(request.receive, service.limits.body_seconds))
                    async with sent.form(max_files=1, max_fields=MAX_FORM_FIELDS) as form:
                        file = _file_of(form)
                        return json_response(await desk.uploads.add(tenant, file.filename or "", file.file))
            except TimeoutError:
                problem = f"the file did not arrive within {UPLOAD_SECONDS:g} s, or its next part not in time"
                raise ApiError(408, problem, code="timeout") from None

    async def show_all(request: Request) -> Response:
        purpose, (after, limit) = request.query_params.get("purpose"), page_of(request, MOST_LISTED, MOST_LISTED)
        files = desk.records.of_tenant(tenant_of(request), "file")
        if request.query_params.get("order") == "asc":
            files.reverse()
        return json_response(listed([f for f in files if purpose in (None, f["purpose"])], after, limit))

    async def show(request: Request) -> Response:
        return json_response(desk.records.get(request.path_params["name"], tenant_of(request), "file"))

    async def content(request: Request) -> Response:
        name = desk.records.get(request.path_params["name"], tenant_of(request), "file")["id"]
        return FileResponse(desk.uploads.path(name), media_type="application/octet-stream")

    async def delete(request: Request) -> Response:
        return json_response(desk.delete_file(request.path_params["name"], tenant_of(request)))

    return [
        Route("/v1/files", upload, methods=["POST"]),
        Route("/v1/files", show_all, methods=["GET"]),
        Route("/v1/files/{name}", show, methods=["GET"]),
        Route("/v1/files/{name}", delete, methods=["DELETE"]),
        Route("/v1/files/{name}/content", content, methods=["GET"]),
    ]


def steady(receive: Receive, seconds: float) -> Receive:
    """An ASGI `receive` that raises TimeoutError where the next part of a body takes too long."""

    async def next_part() -> Message:
        async with asyncio.timeout(seconds):
            return await receive()

    return next_part


def tenant_of(request: Request) -> str:
    """Whose files and batches a request may see."""
    return request.scope["lockstep.tenant"]


def page_of(request: Request, default: int, most: int) -> tuple[str | None, int]:
    """The query's `after` and `limit`. ApiError 400."""
    limit = request.query_params.get("limit", str(default))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 6 and 1 <= int(limit) <= most):
        raise wrong_field("limit", f"expected 1 to {most}, got {limit[:20]!r}")
    return request.query_params.get("after"), int(limit)


def _file_of(form: FormData) -> UploadFile:
    """The file of a form. ApiError 400 for a form that has none, or that asks for what is not done here."""
    if (purpose := form.get("purpose")) != "batch":
        raise wrong_field("purpose", f'expected "batch", got {str(purpose)[:80]!r}', "unsupported")
    if unknown := sorted(set(form) - {"file", "purpose"}):
        raise wrong_field(unknown[0][:80], "this field of a file is not known here", "unsupported")
    if not isinstance(file := form.get("file"), UploadFile):
        raise wrong_field("file", "expected a file with a name", "missing_field")
    return file
