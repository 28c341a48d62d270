"""Errors as HTTP responses in OpenAI's shape."""

import json
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.errors import Internal, MoejaxError, PromptTooLong


def error_body(error: MoejaxError) -> dict[str, Any]:
    """The JSON of an error."""
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else type(error).__name__
    return {"error": {"message": str(error), "type": error.openai_type, "param": error.param, "code": code}}


async def moejax_error(_: Request, error: Exception) -> Response:
    """A MoejaxError with its status; Retry-After where trying again makes sense."""
    assert isinstance(error, MoejaxError)
    after = error.retry_after_s
    if after is None and error.http_status == 503:
        after = 1.0
    headers = {} if after is None else {"Retry-After": str(max(1, math.ceil(after)))}
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _response(error_body(error), error.http_status, headers)


async def routing_error(_: Request, error: Exception) -> Response:
    """What HTTP itself refuses: 404, 405, 413, 415."""
    assert isinstance(error, HTTPException)
    body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return _response({"error": body}, error.status_code, dict(error.headers or {}))


async def defect(_: Request, error: Exception) -> Response:
    """A defect of ours, without its text; the server's log has it."""
    return _response(error_body(Internal("internal error; the server's log has the details.")), 500, {})


def _response(body: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    # ASCII: a message may quote half of a surrogate pair that a caller sent, which UTF-8 cannot write.
    return Response(json.dumps(body), status, headers, "application/json")
