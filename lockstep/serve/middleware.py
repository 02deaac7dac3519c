"""Middleware: error objects, API keys, and checks of Host and Origin."""

import hashlib
import hmac

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from lockstep.serve import request_target
from lockstep.serve.errors import ApiError, error_response
from lockstep.serve.exchange import Exchange
from lockstep.serve.routes.page import FILES
from lockstep.serve.service import Service

OPEN_PATHS = frozenset(["/health", "/ready", *FILES])  # these need no key; the page asks for one itself


class GuardMiddleware:
    """Makes an Exchange of each request, scope["lockstep.exchange"], and turns every exception into an error object."""

    def __init__(self, app, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        exchange = scope["lockstep.exchange"] = Exchange(self._service, scope, receive, send)
        try:
            exchange.check_length()
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.left()
        except Exception as error:
            problem = exchange.failed(error)
            if exchange.started:
                raise
            await error_response(problem, scope["path"])(scope, receive, exchange.send)
        finally:
            exchange.close()


class ApiKeyMiddleware:
    """Refuses requests without one of the service's API keys, if it has any, and notes which key a request has.

    scope["lockstep.tenant"]: the key's digest, "" without a key.
    """

    def __init__(self, app, service: Service) -> None:
        self._app, self._tenants = app, {key: tenant(key) for key in service.api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["lockstep.tenant"] = ""
            if self._tenants and scope["path"] not in OPEN_PATHS:
                scope["lockstep.tenant"] = self._check(dict(scope["headers"]))
        await self._app(scope, receive, send)

    def _check(self, headers):
        """The tenant of the request's key. ApiError 401 without a valid one, in OpenAI's header or Anthropic's."""
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        sent = [credentials.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"")]
        # every comparison is made, so that the time says nothing about which key came close
        tenants = [name for key, name in self._tenants.items() for each in sent if hmac.compare_digest(key, each)]
        if not tenants:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return tenants[0]


def tenant(key):
    """A key's digest, 32 hexadecimal digits, which names its owner wherever the key itself must not appear."""
    return hashlib.sha256(b"lockstep tenant " + key).hexdigest()[:32]


class HostMiddleware:
    """Refuses requests whose Host is a name that somebody else may own; for servers without API keys.

    A foreign web page can point its own name to this machine's address (DNS rebinding), and would then be allowed to
    read this server's answers. allowed: names that a Host may have besides addresses and localhost; "*": any.
    """

    def __init__(self, app, allowed=()) -> None:
        self._app, self._allowed = (
            app,
            frozenset(request_target.name_of(each.encode("latin-1", "replace")) for each in allowed),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope["headers"]).get(b"host") if scope["type"] == "http" else None
        if host is not None and not self._is_allowed(request_target.name_of(host)):
            raise ApiError(
                403,
                f"this server may not be called {request_target.quoted(host)}, unless it is started with "
                f"--allowed-host, or with an --api-key",
                code="host_not_allowed",
            )
        await self._app(scope, receive, send)

    def _is_allowed(self, name):
        return request_target.is_local_name(name) or name in self._allowed or "*" in self._allowed


class OriginMiddleware:
    """Refuses requests of foreign web pages: browsers send "simple" ones without a preflight request.

    allowed: origins whose pages may call the server; "*": all. Pages of extensions and files are foreign, too.
    """

    def __init__(self, app, allowed=()) -> None:
        self._app, self._allowed = app, frozenset(each.lower().rstrip("/") for each in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and scope["path"] not in OPEN_PATHS and not self._is_allowed(origin, headers.get(b"host", b"")):
            raise ApiError(
                403,
                f"web pages of {origin[:200]!r} may not call this server, unless it is started with --cors-origin",
                code="origin_not_allowed",
            )
        await self._app(scope, receive, send)

    def _is_allowed(self, origin, host):
        scheme, _, authority = origin.partition("://")
        is_own_page = scheme in ("http", "https") and authority == host.decode("latin-1").lower()
        return is_own_page or bool(self._allowed & {origin, "*"})
