"""Answers browsers that ask whether pages of other sites may call the API (CORS)."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.http.middleware import ADMIN_PREFIX

_EXPOSED = ("X-Request-Id", "X-Moejax-Ignored-Fields", "Retry-After")
"""Headers of responses that a page may read."""


class CrossOriginMiddleware:
    """ASGI middleware that lets pages of `origins` call everything but what changes the server."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._open = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = scope["type"] == "http" and scope["path"].startswith(ADMIN_PREFIX)
        await (self._app if closed else self._open)(scope, receive, send)
