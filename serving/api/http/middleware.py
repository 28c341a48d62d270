"""Applies the limits of a server to HTTP: API keys, the number of streams, the size of bodies, slow clients."""

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.http.errors import moejax_error, routing_error
from serving.api.http.packed_body import PACKED, PLAIN, PackedBody, too_long
from serving.auth.limits import CallLimits
from serving.errors import DeadlineExceeded, MoejaxError
from serving.observability.tracing import TRACEPARENT

log = logging.getLogger(__name__)

PROTECTED_PREFIXES = ("/v1/", "/tokenize", "/detokenize", "/fault_tolerance/")
"""Paths that need an API key if the server has keys. Probes, /metrics and the files of the dashboard do not."""
_READ_PREFIXES = ("/v1/resume", "/v1/responses/")
"""Paths whose GET is a stream too."""
ADMIN_PREFIX = "/fault_tolerance/"
"""A POST to these paths changes the server and needs an admin key."""


class _ClientStalled(Exception):
    """The client reads nothing."""


def _authorization(headers: Headers) -> str | None:
    """The API key of a call: clients of Anthropic's API send it as X-Api-Key."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (None if key is None else f"Bearer {key}")


class LimitsMiddleware:
    """ASGI middleware that applies a `CallLimits`."""

    def __init__(self, app: ASGIApp, limits: CallLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        TRACEPARENT.set(Headers(scope=scope).get("traceparent", ""))
        path, posts = scope["path"], scope["method"] == "POST"
        size, bound = sum(len(name) + len(value) for name, value in scope["headers"]), self._limits.max_header_bytes
        if size > bound:  # the parser of uvicorn limits only headers that arrive in several pieces
            response = await routing_error(
                Request(scope),
                HTTPException(431, f"the headers have {size} bytes; the limit is {bound} (--max-header-bytes)."),
            )
            await response(scope, receive, send)
            return
        try:
            if path.startswith(PROTECTED_PREFIXES):
                authorization = _authorization(Headers(scope=scope))
                self._limits.authorize(authorization, admin=posts and path.startswith(ADMIN_PREFIX))
            if not (posts and path.startswith("/v1/")) and not path.startswith(_READ_PREFIXES):
                await self._app(scope, self._limited_receive(scope, receive), self._limited_send(send))
                return
            with self._limits.open_stream():
                await self._app(scope, self._limited_receive(scope, receive), self._limited_send(send))
        except _ClientStalled:
            log.info("a client of %s read nothing for %g s; its request is cancelled", path, self._limits.slow_client_s)
        except MoejaxError as error:  # raised by the limits; errors of the application are responses already
            response = await moejax_error(Request(scope, receive), error)
            await response(scope, receive, send)

    def _limited_receive(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with a limit on the size of the body, unpacked if it is packed, and on the time between two pieces
        of it."""
        complete, size, bound = False, 0, self._limits.max_body_bytes
        encoding = Headers(scope=scope).get("content-encoding", "").strip().lower()
        unpacked = PackedBody(bound, encoding) if encoding in PACKED else None

        async def receive_limited() -> Message:
            nonlocal complete, size
            if complete:
                return await receive()
            if unpacked is None and encoding not in PLAIN:
                text = f"the body is encoded as {encoding[:40]!r}. Send it as it is, as gzip or as deflate."
                raise HTTPException(415, text, {"Accept-Encoding": "gzip, deflate"})
            try:
                async with asyncio.timeout(self._limits.slow_client_s):
                    message = await receive()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the body did not arrive within {self._limits.slow_client_s:g} s (--slow-client-s)."
                ) from None
            complete, body = not message.get("more_body", False), message.get("body", b"")
            size += len(body)
            if size > bound:
                raise too_long(bound)
            if unpacked is not None and message["type"] == "http.request":
                message = {**message, "body": unpacked.push(body, last=complete)}
            return message

        return receive_limited

    def _limited_send(self, send: Send) -> Send:
        """`send` that raises when the client reads nothing, which ends its request."""

        async def send_limited(message: Message) -> None:
            try:
                async with asyncio.timeout(self._limits.slow_client_s):
                    await send(message)
            except TimeoutError:
                raise _ClientStalled from None

        return send_limited
