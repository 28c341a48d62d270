"""Makes the path of a request the one of a route, however the client or a proxy has written it."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_ORIGIN = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


class RequestTargetMiddleware:
    """ASGI middleware that takes off what stands before the path: scheme and host, which a proxy's client writes and
    every server must accept (RFC 9112, 3.2.2), and `root_path`, which some proxies leave in and others do not. Slashes
    in a row are one: they come from a base URL that ends with a slash."""

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        written = scope.get("path", "")
        path = re.sub("/{2,}", "/", written if written.startswith("/") else _ORIGIN.sub("", written, 1) or "/")
        if self._root_path and (path == self._root_path or path.startswith(f"{self._root_path}/")):
            path = path[len(self._root_path) :] or "/"
        if path != written:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)
