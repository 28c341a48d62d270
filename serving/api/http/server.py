"""Starts the HTTP server: OpenAI's completions, health, metrics, fault tolerance and the dashboard.

An error before the first token has its own HTTP status; a later one is an `error` event in the stream. When a client
disconnects, its request is cancelled; a client that does not read is held back by TCP flow control.
"""

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from serving.api.http import anthropic, responses
from serving.api.http.completions import CompletionEndpoints
from serving.api.http.cross_origin import CrossOriginMiddleware
from serving.api.http.errors import internal_error, moejax_error, routing_error
from serving.api.http.fault_tolerance import FaultToleranceEndpoints
from serving.api.http.middleware import LimitsMiddleware
from serving.api.http.models import ModelEndpoints
from serving.api.http.probes import ProbeEndpoints
from serving.api.http.request_ids import RequestIdMiddleware
from serving.api.http.request_target import RequestTargetMiddleware
from serving.api.http.resume import ResumeEndpoint
from serving.api.shutdown import Shutdown
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import HttpSettings, Settings, listed
from serving.core.request_processor import RequestProcessor
from serving.errors import MoejaxError, StartError
from serving.observability.history import History
from serving.protocol.backend import answered

BACKLOG = 2048
"""Connections that wait to be accepted."""
KEEP_ALIVE_S = 75
"""Seconds until a connection without a request is closed. Proxies and clients keep theirs for up to a minute, and a
request that they send just as the server closes its connection fails; they must be the first to close it."""
CLOSE = (b"connection", b"close")
SHARED_BACKLOG = 16
"""Connections that asyncio accepts at once: one process does not take all of a burst from the others."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket for HTTP at an address, not yet listening. Raises StartError when it cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> StartError:
    return StartError(
        f"HTTP cannot listen on {host}:{port}: {error.strerror}. Choose another port with --http-port, "
        "or 0 for any free one."
    )


class HttpServer:
    """A running HTTP server. `port` is the port in use, also when 0 was given."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None], port: int, shutdown: Shutdown) -> None:
        self._server = server
        self._task = task
        self._shutdown = shutdown
        self.port = port

    async def stop(self, grace_s: float | None = None, *, linger_s: float = 0.0) -> None:
        """Refuse new requests, end the event streams, and cancel the other requests after `grace_s` seconds.

        Connections that are open can have further requests, each of which is answered with `Connection: close`, and are
        closed `linger_s` seconds after the last one has ended: a client that sends one just then would find its
        connection closed under it."""
        self._shutdown.begin()
        if linger_s:
            await self._linger(linger_s, time.monotonic() + (grace_s or 0.0))
        self._server.config.timeout_graceful_shutdown = max(1, math.ceil(grace_s or 0))
        self._server.should_exit = True
        await self._task

    async def _linger(self, linger_s: float, until: float) -> None:
        state, idle_since = self._server.server_state, dict[Any, float]()
        for server in self._server.servers:
            server.close()
        state.default_headers.append(CLOSE)
        self._server.config.encoded_headers.append(CLOSE)  # of which uvicorn makes the default ones each second
        while state.connections and (now := time.monotonic()) < until:
            for connection in list(state.connections):
                cycle = getattr(connection, "cycle", None)
                if cycle is not None and not cycle.response_complete:
                    idle_since.pop(connection, None)
                elif now - idle_since.setdefault(connection, now) >= linger_s:
                    connection.shutdown()
            await asyncio.sleep(0.02)


async def start_http(
    processor: RequestProcessor,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: CallLimits | None = None,
    tls: ServerTls | None = None,
    settings: HttpSettings | None = None,
    listener: socket.socket | None = None,
) -> HttpServer:
    """Serve on host:port, or on a bound `listener` that other processes may serve on too. Raises StartError when the
    port cannot be opened."""
    shutdown, limits = Shutdown(), limits or CallLimits.of(Settings())
    shared = listener is not None
    listener = listener or bound_socket(host, port)
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # another server that was starting at the same time has the port
        raise _cannot_listen(host, port, error) from error
    # Each connection inherits both options. The kernel closes one whose client acknowledges nothing for that long, and
    # sends each event at once: asyncio sets TCP_NODELAY only on a socket made with a protocol, which this one is not.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * limits.slow_client_s))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        application(processor, shutdown, limits, settings),
        http="h11",
        h11_max_incomplete_event_size=limits.max_header_bytes,
        **(tls.uvicorn() if tls is not None else {}),
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=SHARED_BACKLOG if shared else BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _UvicornServer(config)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started and not task.done():
        await asyncio.sleep(0.005)
    if shared:
        listener.listen(BACKLOG)
    return HttpServer(server, task, listener.getsockname()[1], shutdown)


class _UvicornServer(uvicorn.Server):
    """Installs no signal handlers: the application that runs the server does."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def application(
    processor: RequestProcessor,
    shutdown: Shutdown | None = None,
    limits: CallLimits | None = None,
    settings: HttpSettings | None = None,
) -> Starlette:
    """The ASGI application. `lifespan` also copies events into metrics, and keeps the history, while it runs."""
    settings = settings or HttpSettings()
    origins = listed(settings.allowed_origins)
    history = History()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        followers = [asyncio.create_task(history.follow(lambda: answered(processor.backend.status())))]
        if processor.metrics.counts_events:
            followers.append(asyncio.create_task(processor.metrics.follow()))
        yield
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)

    return Starlette(
        lifespan=lifespan,
        middleware=[
            Middleware(RequestTargetMiddleware, root_path=settings.root_path),
            *([Middleware(CrossOriginMiddleware, origins=origins)] if origins else []),
            Middleware(RequestIdMiddleware),
            Middleware(LimitsMiddleware, limits=limits or CallLimits.of(Settings())),
        ],
        routes=_routes(processor, shutdown or Shutdown(), settings, history),
        exception_handlers={MoejaxError: moejax_error, HTTPException: routing_error, Exception: internal_error},
    )


def _routes(processor: RequestProcessor, shutdown: Shutdown, settings: HttpSettings, history: History) -> list[Route]:
    completions = CompletionEndpoints(processor, settings)
    messages = anthropic.MessagesEndpoints(processor, settings)
    answers = responses.ResponsesEndpoints(processor, settings)
    apis = {"": completions.resume, anthropic.FORM: messages.resume, responses.FORM: answers.resume}
    resume = ResumeEndpoint(processor, apis)
    models = ModelEndpoints(processor, settings)
    faults = FaultToleranceEndpoints(processor, shutdown, history)
    probes = ProbeEndpoints(processor, settings)
    return [
        Route("/v1/completions", completions.completions, methods=["POST"]),
        Route("/v1/chat/completions", completions.chat_completions, methods=["POST"]),
        Route("/v1/resume", resume.resume, methods=["GET", "POST"]),
        Route("/v1/responses", answers.create, methods=["POST"]),
        Route("/v1/responses/{id}", answers.get),
        Route("/v1/responses/{id}", answers.delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/cancel", answers.cancel, methods=["POST"]),
        Route("/v1/messages", messages.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        Route("/tokenize", completions.tokenize, methods=["POST"]),
        Route("/detokenize", completions.detokenize, methods=["POST"]),
        Route("/tokenizer_info", models.tokenizer_info),
        Route("/v1/models", models.all),
        Route("/v1/models/", models.all),
        Route("/v1/models/{name:path}", models.one),
        Route("/fault_tolerance/status", faults.status),
        Route("/fault_tolerance/history", faults.history),
        Route("/fault_tolerance/events", faults.events),
        Route("/fault_tolerance/apply", faults.apply, methods=["POST"]),
        Route("/fault_tolerance/report", faults.report, methods=["POST"]),
        Route("/fault_tolerance/kill", faults.kill, methods=["POST"]),
        Route("/openapi.json", probes.openapi),
        Route("/health", probes.health),
        Route("/live", probes.live),
        Route("/version", probes.version),
        Route("/metrics", probes.metrics),
        Route("/{page}", probes.page),
        Route("/", probes.page),
    ]
