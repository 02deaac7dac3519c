"""The ASGI application: its routes and its middleware."""

import contextlib
import re
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from lockstep.serve.batches.desk import BatchDesk
from lockstep.serve.compressed_body import GzipBodyMiddleware
from lockstep.serve.errors import ApiError, error_response
from lockstep.serve.fields.seed import SEED_HEADER
from lockstep.serve.middleware import ApiKeyMiddleware, GuardMiddleware, HostMiddleware, OriginMiddleware
from lockstep.serve.routes import (
    batches,
    chat,
    completions,
    embeddings,
    files,
    messages,
    page,
    receipts,
    responses,
    status,
    tokens,
)
from lockstep.serve.service import Service

PRIVATE_NETWORK_HEADER = b"access-control-request-private-network"
ROUTE_MODULES = [chat, completions, embeddings, messages, page, receipts, responses, status, tokens]


def make_app(service: Service, cors_origins=(), allowed_hosts=(), files_dir: str | None = None):
    """The ASGI application of a Service.

    cors_origins: origins whose web pages may call the server, besides the server's own page. allowed_hosts: names that
    a Host header may have besides addresses and localhost, checked where no API key is needed. files_dir: a folder for
    files and batches, see BatchDesk.
    """
    desk = BatchDesk(service, inner_app(service), files_dir)
    routes = [*routes_of(service), *files.routes(service, desk), *batches.routes(service, desk)]
    middleware = [
        *([Middleware(PrivateNetworkCORSMiddleware, allowed=cors_origins)] if cors_origins else []),
        Middleware(SlashMiddleware),
        Middleware(GzipBodyMiddleware, max_bytes=service.limits.max_body_bytes),
        Middleware(GuardMiddleware, service=service),
        *([] if service.api_keys else [Middleware(HostMiddleware, allowed=allowed_hosts)]),
        Middleware(OriginMiddleware, allowed=cors_origins),
        Middleware(ApiKeyMiddleware, service=service),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app):
        desk.start()
        yield
        await desk.stop()
        service.close()

    handlers = {HTTPException: _router_refusal}
    app = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would go wherever the request's Host says
    return app


def routes_of(service: Service) -> list[BaseRoute]:
    """The routes of all modules."""
    return [route for module in ROUTE_MODULES for route in module.routes(service)]


def inner_app(service: Service) -> Starlette:
    """The application as this process itself calls it: without what guards the server against strangers. Whoever calls
    it says in scope["lockstep.tenant"] for whom."""
    guard = Middleware(GuardMiddleware, service=service)
    return Starlette(routes=routes_of(service), middleware=[guard], exception_handlers={HTTPException: _router_refusal})


class SlashMiddleware:
    """Treats repeated slashes in a path as one: clients join a base URL that ends in "/" with "/v1/..."."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "//" in scope["path"]:
            scope = {**scope, "path": re.sub("/{2,}", "/", scope["path"])}
        await self._app(scope, receive, send)


class PrivateNetworkCORSMiddleware(CORSMiddleware):
    """CORS for web pages of the allowed origins, also where a page of the public internet calls a private network."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        methods, shown = ["GET", "POST", "DELETE"], [SEED_HEADER]
        super().__init__(
            app, allow_origins=list(allowed), allow_methods=methods, allow_headers=["*"], expose_headers=shown
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """The response to a browser's preflight request. Starlette's versions treat the private-network header
        differently, so it is removed before starlette sees the headers."""
        others = Headers(raw=[each for each in request_headers.raw if each[0] != PRIVATE_NETWORK_HEADER])
        response = super().preflight_response(others)
        values = [value.strip().lower() for name, value in request_headers.raw if name == PRIVATE_NETWORK_HEADER]
        if b"true" in values and self.is_allowed_origin(request_headers["origin"]):
            response.headers["access-control-allow-private-network"] = "true"
        return response


async def _router_refusal(request, error):
    """The response where the router knows no such path, or the path does not take the method."""
    path, allowed = request.url.path[:200], (error.headers or {}).get("Allow")
    message = {404: f"there is no {path}", 405: f"{path} takes {allowed}, got {request.method}"}
    api_error = ApiError(error.status_code, message.get(error.status_code) or str(error.detail))
    response = error_response(api_error, request.url.path)
    response.headers.update(error.headers or {})
    return response
