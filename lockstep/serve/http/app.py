"""The application: its routes, and what every request passes before it gets to one."""
import contextlib
import hmac

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from lockstep.serve.http import chat, completions, messages, models, status
from lockstep.serve.http.errors import ApiError, error_response

ROUTES = [
    chat,
    completions,
    messages,
    models,
    status,
]
OPEN_PATHS = ("/health", "/ready")  # these need no key


def make_app(service, cors_origins=()):
    """The ASGI application of a Service. cors_origins: web pages that may call it, besides its own."""
    routes = [route for module in ROUTES for route in module.routes(service)]
    passed = [Middleware(Guard, service=service), Middleware(Keys, service=service)]
    if cors_origins:
        allowed = dict(allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"])
        passed.insert(0, Middleware(CORSMiddleware, **allowed))

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        service.close()

    return Starlette(routes=routes, middleware=passed, lifespan=lifespan, exception_handlers={HTTPException: _as_api})


async def _as_api(request, error):
    """What the router refuses: no such path, or not with this method."""
    message = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
    found = ApiError(error.status_code, message.get(error.status_code, error.detail))
    response = error_response(found, request.url.path)
    response.headers.update(error.headers or {})
    return response


class Guard:
    """Turns every exception into an error object, and counts answers."""

    def __init__(self, app, service):
        self._app, self._service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def counted(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._service.metrics.answer(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except ClientDisconnect:
            self._service.metrics.cancelled += 1
        except Exception as error:
            if started:
                raise
            await error_response(self._service.explain(error), scope["path"])(scope, receive, counted)


class Keys:
    """Lets requests pass that carry one of the service's API keys, if it has any."""

    def __init__(self, app, service):
        self._app, self._service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and self._service.api_keys and scope["path"] not in OPEN_PATHS:
            self._check(dict(scope["headers"]))
        await self._app(scope, receive, send)

    def _check(self, headers):
        """ApiError 401 without a right key, as OpenAI's clients send it or as Anthropic's do."""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        found = [given.strip() if kind.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"")]
        # every comparison is made, so that the time says nothing about which key came close
        matches = [hmac.compare_digest(key, each) for key in self._service.api_keys for each in found]
        if not any(matches):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
