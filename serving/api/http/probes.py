"""The endpoints for probes, scrapers and people: health, version, metrics, the API's document, the dashboard."""

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.http.openapi import openapi_document
from serving.config import HttpSettings
from serving.core.request_processor import RequestProcessor
from serving.protocol.backend import answered
from serving.version import version

_DASHBOARD = Path(__file__).parents[2] / "dashboard"
_PAGES = {
    "": "text/html",
    "dashboard.css": "text/css",
    "dashboard.js": "text/javascript",
    "chart.js": "text/javascript",
    "headline.js": "text/javascript",
    "parts.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "docs": "text/html",
    "docs.js": "text/javascript",
    "docs.css": "text/css",
}
"""Media types of the dashboard's files; "" is index.html and "docs" is docs.html."""
_FILES = {"": "index.html", "docs": "docs.html"}
_CONTENT_SECURITY_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class ProbeEndpoints:
    """The endpoints over a `RequestProcessor`."""

    def __init__(self, processor: RequestProcessor, settings: HttpSettings) -> None:
        self._processor = processor
        self._root_path = settings.root_path

    async def health(self, _: Request) -> Response:
        """Readiness: 503 while no request can be served."""
        if self._processor.backend.recovering:
            return JSONResponse({"status": "recovering"}, 503, {"Retry-After": "1"})
        status = await answered(self._processor.backend.status())
        if status.ready and not status.draining:
            failing = {"notes": ["the journal cannot be written: a new front could not continue the requests"]}
            return JSONResponse({"status": "ready"} | (failing if status.journal == "failing" else {}))
        state = "no plan can serve with the ranks alive"
        if status.draining or status.paused:
            state = "draining" if status.draining else "paused"
        return JSONResponse({"status": state}, 503, {"Retry-After": "1"})

    async def live(self, _: Request) -> Response:
        """Liveness: a server in recovery is alive and must not be restarted."""
        return JSONResponse({"status": "alive"})

    async def version(self, _: Request) -> Response:
        """The version of moejax."""
        return JSONResponse({"version": version()})

    async def metrics(self, _: Request) -> Response:
        """All metrics in the text format of Prometheus."""
        status = await answered(self._processor.backend.status())
        return Response(self._processor.metrics.render(status), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _: Request) -> Response:
        """This HTTP surface as an OpenAPI document."""
        return JSONResponse(openapi_document(self._root_path))

    async def page(self, request: Request) -> Response:
        """A file of the dashboard or of the page of the API. They need no build and load nothing from other sites."""
        name = str(request.path_params.get("page", ""))
        if name not in _PAGES:
            raise HTTPException(404, f"there is no {request.url.path}.")
        headers = {
            "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return Response((_DASHBOARD / _FILES.get(name, name)).read_bytes(), 200, headers, _PAGES[name])
