"""What every request passes on its way to a route: counted, held to the size of a body, and let in by its key."""

import hashlib
import hmac

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from lockstep.serve import request_target as target
from lockstep.serve.errors import ApiError, error_response
from lockstep.serve.routes.page import FILES
from lockstep.serve.service import Service

OPEN_PATHS = frozenset(["/health", "/ready", *FILES])  # these need no key; the page asks for one itself


class Guard:
    """Turns every exception into an error object, counts answers and bounds bodies, each one and all together."""

    def __init__(self, app, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        passage = Passage(self._service, receive, send)
        try:
            passage.check_length(dict(scope["headers"]).get(b"content-length", b"0"))
            await self._app(scope, passage.receive, passage.send)
        except ClientDisconnect:
            self._service.metrics.cancelled += 1
        except Exception as error:
            if passage.started:
                raise
            await error_response(self._service.explain(error), scope["path"])(scope, receive, passage.send)
        finally:
            passage.close()


class Passage:
    """One request and its answer. started: whether the answer began."""

    def __init__(self, service: Service, receive: Receive, send: Send) -> None:
        self._service, self._receive, self._send = service, receive, send
        self.started, self._num_bytes = False, 0

    def check_length(self, declared) -> None:
        """ApiError 413 for a Content-Length that is too large."""
        if not declared.isdigit() or len(declared) > 20 or int(declared) > self._service.limits.max_body_bytes:
            raise self._too_large()

    async def receive(self):
        """The next part of the body, or the client's leaving. ApiError 413 or 429 where that makes too many bytes."""
        message = await self._receive()
        size = len(message.get("body", b""))
        if size:
            self._take(size)
        return message

    def _take(self, size) -> None:
        limits = self._service.limits
        self._num_bytes += size
        self._service.num_bytes += size
        if self._num_bytes > limits.max_body_bytes:
            raise self._too_large()
        if self._service.num_bytes > limits.max_pending_bytes and self._service.num_bytes > self._num_bytes:
            raise self._service.full("bodies_full", "the bodies of the requests in work take too much memory")

    def _too_large(self):
        limit = self._service.limits.max_body_bytes
        return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")

    async def send(self, message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            self.started = True
            self._service.metrics.answered[message["status"]] += 1
        await self._send(message)

    def close(self) -> None:
        """The body's memory is free."""
        self._service.num_bytes -= self._num_bytes


class Keys:
    """Lets requests pass that carry one of the service's API keys, if it has any, and notes whose they are.

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
        """Whose key it is. ApiError 401 without a right key, as OpenAI's clients send it or as Anthropic's do."""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        sent = [given.strip() if kind.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"")]
        # every comparison is made, so that the time says nothing about which key came close
        found = [name for key, name in self._tenants.items() for each in sent if hmac.compare_digest(key, each)]
        if not found:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return found[0]


def tenant(key):
    """What stands for the owner of a key where the key itself must not be: 32 hexadecimal digits."""
    return hashlib.sha256(b"lockstep tenant " + key).hexdigest()[:32]


class Hosts:
    """Refuses requests that call this server by a name which could be another's; for servers without keys.

    A web page from elsewhere can have its own name changed to this machine's address (DNS rebinding), and would then
    read all that this server says. allowed: names that may be used besides addresses and localhost; "*": any.
    """

    def __init__(self, app, allowed=()) -> None:
        self._app, self._allowed = app, frozenset(target.name_of(each.encode("latin-1", "replace")) for each in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope["headers"]).get(b"host") if scope["type"] == "http" else None
        if host is not None and not self._may(target.name_of(host)):
            raise ApiError(
                403,
                f"this server may not be called {target.shown(host)}, unless it is started with "
                f"--allowed-host, or with an --api-key",
                code="host_not_allowed",
            )
        await self._app(scope, receive, send)

    def _may(self, name):
        return target.is_here(name) or name in self._allowed or "*" in self._allowed


class Origins:
    """Refuses requests of web pages from elsewhere, which browsers send without asking first where they look simple.

    allowed: origins of pages that may, "*": of all. Pages of other schemes, such as those of extensions and files, are
    from elsewhere, too.
    """

    def __init__(self, app, allowed=()) -> None:
        self._app, self._allowed = app, frozenset(each.lower().rstrip("/") for each in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and scope["path"] not in OPEN_PATHS and not self._may(origin, headers.get(b"host", b"")):
            raise ApiError(
                403,
                f"web pages of {origin[:200]!r} may not call this server, unless it is started with --cors-origin",
                code="origin_not_allowed",
            )
        await self._app(scope, receive, send)

    def _may(self, origin, host):
        scheme, _, place = origin.partition("://")
        own = scheme in ("http", "https") and place == host.decode("latin-1").lower()
        return own or bool(self._allowed & {origin, "*"})
