"""The application: its routes, and what wraps them."""
import contextlib

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from lockstep.serve.http import chat, completions, embeddings, messages, models, page, responses, status, tokens
from lockstep.serve.http.errors import ApiError, error_response
from lockstep.serve.http.guard import Guard, Keys, Origins

ROUTES = [
    chat,
    completions,
    embeddings,
    messages,
    models,
    page,
    responses,
    status,
    tokens,
]


def make_app(service, cors_origins=(), is_local=True):
    """The ASGI application of a Service. cors_origins: web pages that may call it, besides its own; is_local: only this
    machine can reach it."""
    routes = [route for module in ROUTES for route in module.routes(service)]
    passed = [Middleware(Guard, service=service), Middleware(Origins, allowed=cors_origins, is_local=is_local),
              Middleware(Keys, service=service)]
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
