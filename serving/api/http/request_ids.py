"""Every HTTP answer, errors too, bears an id: the caller's `X-Request-Id`, or one of ours."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
LONGEST = 128


class RequestIds:
    """ASGI middleware. The application may put another id of its own in `request.state.request_id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")[:LONGEST]
        state = scope.setdefault("state", {})
        state["request_id"] = f"req-{uuid.uuid4().hex}"

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = given or state["request_id"]
            await send(message)

        await self._app(scope, receive, tell)
