"""Gives every HTTP response, errors included, the id that its caller sent in `X-Request-Id`, or a new one."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
ANTHROPIC_HEADER = "Request-Id"
"""The same id, under the name by which clients of Anthropic's API know it."""
MAX_LENGTH = 128


class RequestIdMiddleware:
    """ASGI middleware. An endpoint may replace the new id by setting `request.state.request_id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")[:MAX_LENGTH]
        state = scope.setdefault("state", {})
        state["request_id"] = f"req-{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[HEADER] = headers[ANTHROPIC_HEADER] = given or state["request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)
