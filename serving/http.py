"""The HTTP surface: OpenAI's completions, health, metrics, fault tolerance and the dashboard.

An error before the first token has its own HTTP status; one after it is an `error` event in the stream.
A client that goes away cancels its request; one that does not read is held by TCP flow control.
"""

import asyncio
import contextlib
import dataclasses
import math
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving import calls
from serving.answers import Answer
from serving.body import read_json, unless_gone
from serving.bounds import check_tokens
from serving.closing import Closing
from serving.config import Settings
from serving.errors import Draining, InvalidRequest, MoejaxError, StartError
from serving.faults import DeviceError, Instruction, permit
from serving.generation import Generation, Item
from serving.guard import Guard
from serving.guard_http import HttpGuard
from serving.http_errors import defect, moejax_error, routing_error
from serving.keys import CALLER
from serving.openapi import document
from serving.request_ids import RequestIds
from serving.sse import EventStream, Places, answer_events, frame
from serving.status import SIGNALS, SIGNALS_TO_WEIGHTS
from serving.tls import ServerTls
from serving.version import version

_DASHBOARD = Path(__file__).parent / "dashboard"
_PAGES = {
    "": "text/html",
    "dashboard.css": "text/css",
    "dashboard.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class HttpServer:
    """A running HTTP server. `port` is the one in use, also when 0 was asked for."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None], port: int, closing: Closing) -> None:
        self._server = server
        self._task = task
        self._closing = closing
        self.port = port

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no new requests, end the watches, wait up to `grace_s` for the rest, then cancel it."""
        self._closing.set()
        self._server.config.timeout_graceful_shutdown = max(1, math.ceil(grace_s or 0))
        self._server.should_exit = True
        await self._task


async def start(
    generation: Generation,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    guard: Guard | None = None,
    tls: ServerTls | None = None,
) -> HttpServer:
    """Serve on host:port. Raises StartError when the port cannot be had."""
    closing, guard = Closing(), guard or Guard.of(Settings())
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(
            f"HTTP cannot listen on {host}:{port}: {error.strerror}. Choose another port with --http-port, "
            "or 0 for any free one."
        ) from error
    # Inherited by each connection: one whose client takes nothing for that long is cut.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * guard.slow_client_s))
    config = uvicorn.Config(
        application(generation, closing, guard),
        http="h11",
        h11_max_incomplete_event_size=guard.max_header_bytes,
        **(tls.uvicorn() if tls is not None else {}),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started and not task.done():
        await asyncio.sleep(0.005)
    return HttpServer(server, task, listener.getsockname()[1], closing)


class _Server(uvicorn.Server):
    """Leaves the signals to whoever runs the whole server."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def application(generation: Generation, closing: Closing | None = None, guard: Guard | None = None) -> Starlette:
    """The ASGI application."""
    api = _Api(generation, closing or Closing())

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        follower = asyncio.create_task(generation.metrics.follow())
        yield
        follower.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await follower

    return Starlette(
        lifespan=lifespan,
        middleware=[Middleware(RequestIds), Middleware(HttpGuard, guard=guard or Guard.of(Settings()))],
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
            Route("/v1/resume", api.resume, methods=["GET", "POST"]),
            Route("/tokenize", api.tokenize, methods=["POST"]),
            Route("/detokenize", api.detokenize, methods=["POST"]),
            Route("/openapi.json", api.openapi),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.one_model),
            Route("/health", api.health),
            Route("/live", api.live),
            Route("/version", api.version),
            Route("/metrics", api.metrics),
            Route("/fault_tolerance/status", api.status),
            Route("/fault_tolerance/events", api.events),
            Route("/fault_tolerance/apply", api.apply, methods=["POST"]),
            Route("/fault_tolerance/report", api.report, methods=["POST"]),
            Route("/fault_tolerance/kill", api.kill, methods=["POST"]),
            Route("/{page}", api.page),
            Route("/", api.page),
        ],
        exception_handlers={MoejaxError: moejax_error, HTTPException: routing_error, Exception: defect},
    )


class _Api:
    """The endpoints."""

    def __init__(self, generation: Generation, closing: Closing) -> None:
        self._generation = generation
        self._backend = generation.backend
        self._closing = closing

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        return await self._complete(request, chat=True)

    async def _complete(self, request: Request, *, chat: bool) -> Response:
        model = self._backend.model.name
        body = await read_json(request)
        call = calls.read(body, chat=chat, model=model)
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        request.state.request_id = request_id
        accepted = await self._generation.accept_all(call.prompts, call.params, request_id=request_id)
        created = int(time.time())
        answer = Answer(call, accepted, request_id, model, self._generation.tokenizer, created)
        form = {"chat": chat, "body": body}
        items = self._generation.streams(accepted, call.params.stop, form=form, created=created)
        if not call.stream:
            return JSONResponse(answer.whole(await unless_gone(request, _all(items))))
        first = await unless_gone(request, anext(items))  # a refusal still has its own status here
        return EventStream(answer_events(answer, first, items, self._places(request_id, accepted)), items)

    def _places(self, call_id: str, requests: Sequence[Any], had: Sequence[int] = ()) -> Places | None:
        return Places(call_id, len(requests), had) if self._backend.resumable else None

    async def resume(self, request: Request) -> Response:
        """The events of a stream that broke, after the one that Last-Event-ID names."""
        call_id, had = Places.read(request.headers.get("last-event-id", ""))
        kept = self._generation.recall(call_id)
        if kept.form is None or "body" not in kept.form:
            raise InvalidRequest("the request came over gRPC; go on with it there.", param="last-event-id")
        call = calls.read(kept.form["body"], chat=kept.form["chat"], model=self._backend.model.name)
        request.state.request_id = call_id
        model, tokenizer = self._backend.model.name, self._generation.tokenizer
        answer = Answer(call, kept.requests, call_id, model, tokenizer, kept.created)
        items = self._generation.again(kept)
        first = await unless_gone(request, anext(items))
        return EventStream(answer_events(answer, first, items, self._places(call_id, kept.requests, had)), items)

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a prompt or a conversation, as a completion would have them."""
        tokens = await self._generation.encode(calls.read_text(await read_json(request)))
        context = self._backend.model.max_context
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": context})

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        tokens = calls.read_tokens(await read_json(request))
        check_tokens(tokens, self._backend.model.vocab_size, "tokens")
        return JSONResponse({"prompt": self._generation.tokenizer.decode(tokens)})

    async def openapi(self, _: Request) -> Response:
        """What this surface is, for programs."""
        return JSONResponse(document())

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._backend.model.name:
            raise HTTPException(404, f"the model {request.path_params['name']!r} does not exist.")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        model = self._backend.model
        created = int(self._backend.status().started_at)
        return {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "moejax",
            "max_model_len": model.max_context,
        }

    async def health(self, _: Request) -> Response:
        """Readiness: 503 only while no request can be served."""
        status = self._backend.status()
        if status.ready and not status.draining:
            failing = {"notes": ["the journal cannot be written: requests would not outlive the front"]}
            return JSONResponse({"status": "ready"} | (failing if status.journal == "failing" else {}))
        state = "no plan can serve with the ranks alive"
        if status.draining or status.paused:
            state = "draining" if status.draining else "paused"
        return JSONResponse({"status": state}, 503, {"Retry-After": "1"})

    async def live(self, _: Request) -> Response:
        """Liveness: a server that recovers is alive and must not be restarted."""
        return JSONResponse({"status": "alive"})

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": version()})

    async def metrics(self, _: Request) -> Response:
        return Response(self._generation.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, _: Request) -> Response:
        model = dataclasses.asdict(self._backend.model)
        model["has_chat_template"] = self._generation.tokenizer.has_chat_template
        more = {"model": model, "version": version(), "what_if": list(map(dataclasses.asdict, self._backend.what_if()))}
        return JSONResponse(dataclasses.asdict(self._backend.status()) | more)

    async def apply(self, request: Request) -> Response:
        """A planned change, for callers that may operate the server: answered when it is done."""
        body = await self._operator_body(request)
        serving = await self._backend.apply(Instruction.read(body))
        return JSONResponse({"serving": serving, "epoch": self._backend.status().epoch})

    async def report(self, request: Request) -> Response:
        """A device's error, from callers that may operate the server."""
        body = await self._operator_body(request)
        return JSONResponse({"action": self._backend.report(DeviceError.read(body)).value})

    async def _operator_body(self, request: Request) -> Any:
        _only_json(request)
        status = self._backend.status()
        permit(
            chaos=status.chaos,
            operable=status.operable,
            key=CALLER.get(),
            peer=request.client.host if request.client else "",
        )
        return await read_json(request)

    async def events(self, request: Request) -> Response:
        """Events as server-sent events; `after` or Last-Event-ID says where to go on."""
        text = request.headers.get("last-event-id") or request.query_params.get("after", "0")
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise InvalidRequest(f"after is {text[:40]!r}; it must be the sequence of an event.", param="after")
        return EventStream(self._watch(int(text)))

    async def _watch(self, after: int) -> AsyncGenerator[str, None]:
        with contextlib.suppress(Draining):  # the reader reconnects when the server is back
            async with contextlib.aclosing(self._closing.until(self._backend.watch(after))) as events:
                yield ": watching\n\n"
                async for event in events:
                    yield frame(dataclasses.asdict(event), event.sequence)

    async def kill(self, request: Request) -> Response:
        """Kill or stop a rank. JSON only, so that no page of another site can send it from a browser."""
        _only_json(request)
        body = await read_json(request)
        names = ("rank", "host") if isinstance(body, dict) else ()
        victim = next((name for name in names if type(body.get(name)) is {"rank": int, "host": str}[name]), None)
        if victim is None or body.keys() - {victim, "signal"}:
            text = 'the body must be {"rank": number, "signal": "SIGKILL" or "SIGSTOP"}, or {"host": name, ...}.'
            raise InvalidRequest(text, param="rank")
        signal = body.get("signal", "SIGKILL")
        if signal not in SIGNALS + SIGNALS_TO_WEIGHTS:
            known = ", ".join(SIGNALS + SIGNALS_TO_WEIGHTS)
            raise InvalidRequest(f"signal is {signal!r}; it must be one of {known}.", param="signal")
        await self._backend.kill(body.get("rank", 0), signal, body.get("host", ""))
        return JSONResponse({"killed": body[victim]})

    async def page(self, request: Request) -> Response:
        """The dashboard: three files, no build, nothing from elsewhere."""
        name = request.path_params.get("page", "")
        if name not in _PAGES:
            raise HTTPException(404, f"there is no {request.url.path}.")
        headers = {
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return Response((_DASHBOARD / (name or "index.html")).read_bytes(), 200, headers, _PAGES[name])


def _only_json(request: Request) -> None:
    """JSON alone, so that no page of another site can send it from a browser."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "send the body as Content-Type: application/json.")


async def _all(items: AsyncGenerator[Item, None]) -> list[Item]:
    async with contextlib.aclosing(items):
        return [item async for item in items]
