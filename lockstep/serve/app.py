"""The application: its routes, and what wraps them."""

import contextlib
import re
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lockstep.serve.compressed_body import Unpack
from lockstep.serve.errors import ApiError, error_response
from lockstep.serve.middleware import Guard, Hosts, Keys, Origins
from lockstep.serve.routes import chat, completions, embeddings, messages, page, responses, status, tokens
from lockstep.serve.service import Service

PRIVATE_NETWORK_ASKED = b"access-control-request-private-network"
ROUTES = [chat, completions, embeddings, messages, page, responses, status, tokens]  # modules that have some


def make_app(service: Service, cors_origins=(), allowed_hosts=()):
    """The ASGI application of a Service.

    cors_origins: web pages that may call it, besides its own. allowed_hosts: names that it may be called by, besides
    addresses and localhost, where no key is asked for.
    """
    routes = [route for module in ROUTES for route in module.routes(service)]
    passed = [
        *([Middleware(Cors, allowed=cors_origins)] if cors_origins else []),
        Middleware(OneSlash),
        Middleware(Unpack, max_bytes=service.limits.max_body_bytes),
        Middleware(Guard, service=service),
        *([] if service.api_keys else [Middleware(Hosts, allowed=allowed_hosts)]),
        Middleware(Origins, allowed=cors_origins),
        Middleware(Keys, service=service),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        service.close()

    app = Starlette(routes=routes, middleware=passed, lifespan=lifespan, exception_handlers={HTTPException: _as_api})
    app.router.redirect_slashes = False  # a redirect would go wherever the request's Host says
    return app


class OneSlash:
    """Takes several slashes in a row of a path as one: clients join a base URL that ends with "/" and "/v1/..."."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "//" in scope["path"]:
            scope = {**scope, "path": re.sub("/{2,}", "/", scope["path"])}
        await self._app(scope, receive, send)


class Cors(CORSMiddleware):
    """Lets web pages of allowed origins call the server, also from the public internet into a private network."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        super().__init__(app, allow_origins=list(allowed), allow_methods=["GET", "POST"], allow_headers=["*"])

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to what a browser asks before a request. What starlette makes of a private network depends on its
        version, so it does not see that part."""
        asked = Headers(raw=[each for each in request_headers.raw if each[0] != PRIVATE_NETWORK_ASKED])
        made = super().preflight_response(asked)
        wanted = [value.strip().lower() for name, value in request_headers.raw if name == PRIVATE_NETWORK_ASKED]
        if b"true" in wanted and self.is_allowed_origin(request_headers["origin"]):
            made.headers["access-control-allow-private-network"] = "true"
        return made


async def _as_api(request, error):
    """What the router refuses: no such path, or not with this method."""
    message = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
    found = ApiError(error.status_code, message.get(error.status_code) or str(error.detail))
    response = error_response(found, request.url.path)
    response.headers.update(error.headers or {})
    return response
