"""The guard around the HTTP surface: keys, places for streams, size of bodies, patience with slow clients."""

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import DeadlineExceeded, MoejaxError
from serving.guard import Guard
from serving.http_errors import moejax_error, routing_error
from serving.tracing import TRACEPARENT

log = logging.getLogger(__name__)

GUARDED = ("/v1/", "/tokenize", "/detokenize", "/fault_tolerance/")
"""Paths that need a key where there are keys. Probes, /metrics and the empty dashboard page do not."""
ADMIN = "/fault_tolerance/"
"""What is posted there changes the server."""


class _Unread(Exception):
    """The client takes nothing."""


class HttpGuard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        TRACEPARENT.set(Headers(scope=scope).get("traceparent", ""))
        path, posts = scope["path"], scope["method"] == "POST"
        size, bound = sum(len(name) + len(value) for name, value in scope["headers"]), self._guard.max_header_bytes
        if size > bound:  # the parser bounds only what comes in several pieces
            response = await routing_error(
                Request(scope), HTTPException(431, f"the headers have {size} bytes; at most {bound} are taken.")
            )
            await response(scope, receive, send)
            return
        try:
            if path.startswith(GUARDED):
                authorization = Headers(scope=scope).get("authorization")
                self._guard.admit(authorization, admin=posts and path.startswith(ADMIN))
            if not (posts and path.startswith("/v1/")) and path != "/v1/resume":
                await self._app(scope, self._hearing(receive), self._telling(send))
                return
            with self._guard.stream():
                await self._app(scope, self._hearing(receive), self._telling(send))
        except _Unread:
            log.info("a client of %s did not read for %g s and was given up", path, self._guard.slow_client_s)
        except MoejaxError as error:  # of the guard: those of the application have become answers further in
            response = await moejax_error(Request(scope, receive), error)
            await response(scope, receive, send)

    def _hearing(self, receive: Receive) -> Receive:
        """`receive`, with bounds on a body's size and time; after it comes only the end of the connection."""
        whole, size, bound = False, 0, self._guard.max_body_bytes

        async def hear() -> Message:
            nonlocal whole, size
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(self._guard.slow_client_s):
                    message = await receive()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the body was not there after {self._guard.slow_client_s:g} s (--slow-client-s)."
                ) from None
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > bound:
                raise HTTPException(413, f"the body is longer than {bound} bytes.")
            return message

        return hear

    def _telling(self, send: Send) -> Send:
        """`send`, which gives up a client that does not read: that ends its request."""

        async def tell(message: Message) -> None:
            try:
                async with asyncio.timeout(self._guard.slow_client_s):
                    await send(message)
            except TimeoutError:
                raise _Unread from None

        return tell
