"""Errors as HTTP responses, in OpenAI's shape or, under the paths of its API, in Anthropic's."""

import json
import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.api.http.anthropic_objects import AnthropicError, AnthropicErrorDetail
from serving.api.http.openai_objects import ErrorBody, ErrorDetail
from serving.errors import Internal, MoejaxError, PromptTooLong, QueueFull, Unauthenticated, UnknownRequest

ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Kinds of errors by status; other statuses below 500 are invalid requests, others are errors of the server."""


def anthropic_error(error: MoejaxError, request_id: str | None) -> AnthropicError:
    """An error in Anthropic's shape."""
    return _anthropic_error(error_body(error).error.message, error.http_status, request_id)


def _anthropic_error(message: str, status: int, request_id: str | None) -> AnthropicError:
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return AnthropicError(error=AnthropicErrorDetail(type=kind, message=message), request_id=request_id)


def error_body(error: MoejaxError) -> ErrorBody:
    """The JSON body of an error. Half of a surrogate pair, which UTF-8 cannot encode, becomes a question mark."""
    message = str(error).encode(errors="replace").decode()
    param = None if error.param is None else error.param.encode(errors="replace").decode()
    return ErrorBody(error=ErrorDetail(message=message, type=error.openai_type, param=param, code=_code(error)))


def _code(error: MoejaxError) -> str:
    """The code by which OpenAI's clients know an error; for other errors the name of the class."""
    match error:
        case PromptTooLong():
            return "context_length_exceeded"
        case UnknownRequest(param="model"):
            return "model_not_found"
        case Unauthenticated():
            return "invalid_api_key"
        case QueueFull():
            return "rate_limit_exceeded"
    return type(error).__name__


async def moejax_error(request: Request, error: Exception) -> Response:
    """The response to a MoejaxError: its status, with Retry-After if a retry makes sense."""
    assert isinstance(error, MoejaxError)
    after = error.retry_after_s
    if after is None and error.http_status == 503:
        after = 1.0
    headers = {} if after is None else {"Retry-After": str(max(1, math.ceil(after)))}
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _response(request, error_body(error), error.http_status, headers)


async def routing_error(request: Request, error: Exception) -> Response:
    """The response to an error of HTTP itself: 404, 405, 413, 415, 431."""
    assert isinstance(error, HTTPException)
    detail = ErrorDetail(message=error.detail, type="invalid_request_error", param=None, code=None)
    return _response(request, ErrorBody(error=detail), error.status_code, dict(error.headers or {}))


async def internal_error(request: Request, error: Exception) -> Response:
    """The response to any other exception, without its text, which is in the server's log."""
    return _response(request, error_body(Internal("internal error; the server's log has the details.")), 500, {})


def _response(request: Request, body: ErrorBody, status: int, headers: dict[str, str]) -> Response:
    shown: ErrorBody | AnthropicError = body
    if request.url.path.startswith(ANTHROPIC_PATH):
        shown = _anthropic_error(body.error.message, status, getattr(request.state, "request_id", None))
    # ASCII, because some clients read an error in the encoding of their terminal.
    return Response(json.dumps(msgspec.to_builtins(shown)), status, headers, "application/json")
