"""Errors as clients know them: OpenAI's error object, and Anthropic's on Anthropic's routes."""

from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import Response

from lockstep.engine.request import Request
from lockstep.engine.sampling import NothingAllowed
from lockstep.serve.answers.json_response import to_json
from lockstep.text.tokenizer.tokenizer import TooManyTokens

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An HTTP error for the client. param: the field of the request that is wrong; code: names the error for programs;
    retry_after: seconds, where the client should try again."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """ApiError 400: the request itself is wrong, and trying again does not help."""
    return ApiError(400, message, param, code)


def wrong_field(field: str, problem: str, code: str = "invalid_value") -> ApiError:
    """ApiError 400 for a field, such as "messages[2].content"; problem: what is allowed, and what was got."""
    return bad_request(f"{field}: {problem}", field, code)


def check_most(field: str, value: int, limit: int, unit: str = "") -> None:
    """ApiError 400 if a field has more than `limit` of a unit, such as "characters"; unit "": the field is a number."""
    if value > limit:
        raise wrong_field(field, f"expected at most {limit}{unit and ' '}{unit}, got {value}")


def not_allowed(error: Exception) -> ApiError:
    """A ValueError of the engine as ApiError 400; messages about a field begin with the field's name and a colon."""
    field, colon, _ = str(error).partition(":")
    code = "context_length_exceeded" if isinstance(error, TooManyTokens) else "invalid_value"
    return bad_request(str(error), field if colon and field.isidentifier() else None, code)


def not_generated(request: Request, fields: Sequence[str]) -> Exception:
    """The error for a failed request of the engine: ApiError 400 where one of `fields` left no token to choose, or a
    grammar reached a limit; any other exception is the server's own fault.

    fields: names of the body's fields that restrict tokens, see `token_masks.narrowing_fields`.
    """
    refused, cause = request.refused, request.refused and request.refused.__cause__
    if isinstance(refused, NothingAllowed):
        which = f" that {' and '.join(fields)} allow{'' if len(fields) > 1 else 's'}" if fields else ""
        return _in_field(next(iter(fields), None), f"the answer cannot go on, there is no token left{which}")
    if isinstance(cause, ValueError):  # a grammar reached one of its limits
        return _in_field(next(reversed(fields), None), str(cause).removeprefix("grammar: "))
    return refused or RuntimeError(request.error)


def _in_field(field: str | None, message: str) -> ApiError:
    return ApiError(400, f"{field}: {message}" if field else message, field, "generation_failed")


def openai_shape(error: ApiError) -> dict[str, Any]:
    """{"error": {"message", "type", "param", "code"}}"""
    default = "invalid_request_error" if error.status < 500 else "server_error"
    kind = OPENAI_TYPES.get(error.status, default)
    return {"error": dict(message=error.message, type=kind, param=error.param, code=error.code)}


def anthropic_shape(error: ApiError) -> dict[str, Any]:
    """{"type": "error", "error": {"type", "message"}}"""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    return {"type": "error", "error": dict(type=ANTHROPIC_TYPES.get(error.status, default), message=error.message)}


def shape_for(path: str) -> Callable[[ApiError], dict[str, Any]]:
    """The function that makes the error object of a route: anthropic_shape or openai_shape."""
    return anthropic_shape if path.startswith("/v1/messages") else openai_shape


def error_response(error: ApiError, path: str) -> Response:
    """The Response for an ApiError on a route."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(to_json(shape_for(path)(error)), error.status, headers, "application/json")
