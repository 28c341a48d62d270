"""Serves clients in an edge: gRPC and HTTP over the front of the run folder, until the supervisor ends it.

An edge that is replaced drains: it accepts nothing more, and ends with its last stream. Streams that last longer lose
it as if it had died, and are resumed by id at its successor.
"""

import asyncio
import contextlib
import dataclasses
import math
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from serving.api.surfaces import Ports, Surfaces, open_surfaces, raise_file_limit
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.core.canary_text import check_text
from serving.core.request_processor import RequestProcessor
from serving.edges.front_dialer import FrontDialer, LocalFront
from serving.edges.remote_backend import RemoteBackend
from serving.errors import MoejaxError
from serving.launch.run_folder import RunFolder
from serving.observability import logs
from serving.observability.metrics import Metrics
from serving.observability.tracing import open_tracer
from serving.protocol.prepared_model import PreparedModel
from serving.text.model_files import load_defaults, load_tokenizer

CANCEL_LATE_S = 60.0
"""Seconds by which the servers of gRPC and HTTP would cancel streams later than this edge ends."""
PREPARED_POLL_S = 0.05
"""Seconds between two looks if the first front has prepared the model."""

FindModel = Callable[[RemoteBackend], tuple[Settings, PreparedModel]]
"""Returns the settings and the model of an edge whose front has been reached."""
Check = Callable[[RequestProcessor], Awaitable[None]]
"""Raises StartError when this edge must not serve."""


def serve(settings: Settings, run: RunFolder, listener: socket.socket) -> int:
    """Serve until standard input ends. `listener` is the socket of HTTP. Returns the exit status: 1 when the surfaces
    cannot be opened, or when the front speaks another version."""
    return run_edge(settings, lambda: _serve(settings, run, listener))


def run_edge(settings: Settings, main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run an edge. Returns its exit status."""
    logs.configure(settings.log_format, settings.log_level)
    raise_file_limit()
    try:
        return asyncio.run(main())
    except MoejaxError as error:
        logs.SERVER.error("%s", error)
        return 1


class Orders:
    """The orders to an edge: of its supervisor, as lines of its standard input, or of signals."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        """Set when the edge is to end at once."""
        self.drain = asyncio.Event()
        self.drain_s = 0.0
        """Seconds that streams have to end, once `drain` is set."""

    def follow(self) -> None:
        """Read the input as it comes, in the running event loop. When it has ended the edge ends."""
        os.set_blocking(sys.stdin.fileno(), False)
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._read)

    def _read(self) -> None:
        line = os.read(sys.stdin.fileno(), 1024).decode()
        if not line:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.stop.set()
        elif line.startswith("drain "):
            self.drain_s = float(line.split()[1])
            self.drain.set()


class EdgeServer:
    """An edge over a front. `find_model` is called once the front has answered; `listener` is the socket of HTTP where
    edges share one."""

    def __init__(
        self,
        front: FrontDialer,
        limits: CallLimits,
        tls: ServerTls | None,
        find_model: FindModel,
        listener: socket.socket | None = None,
    ) -> None:
        self.backend = RemoteBackend(front)
        self._limits = limits
        self._tls = tls
        self._find_model = find_model
        self._listener = listener

    async def open(self, stack: contextlib.AsyncExitStack, check: Check | None = None) -> Surfaces:
        """Open gRPC and HTTP once a front is there, and `check` has passed. The stack closes them."""
        backend = self.backend
        stack.push_async_callback(backend.close)
        await backend.open()
        settings, model = self._find_model(backend)
        model = model.with_context(settings.max_context, lambda _: None).with_known_tokens(lambda _: None)
        tracer = None
        if settings.otlp_endpoint is not None:
            tracer = open_tracer(settings.otlp_endpoint)
            stack.callback(tracer.close)
        processor = RequestProcessor(
            backend,
            load_tokenizer(settings, model),
            Metrics(backend, tracer, beside_front=self._listener is not None),
            max_prompt_tokens=settings.max_prompt_tokens,
            sampling_defaults=load_defaults(settings, model),
        )
        if check is not None:
            await check(processor)
        ports = Ports(grpc=settings.grpc_port, http=settings.http_port)
        surfaces = await open_surfaces(stack, processor, settings, self._limits, self._tls, ports, self._listener)
        backend.serve()
        return surfaces

    async def serve(self, surfaces: Surfaces, orders: Orders) -> int:
        """Serve until an order comes, or a front refuses this edge. Returns the exit status."""
        ends = orders.stop, orders.drain, self.backend.refused
        waiting = stopping, *_ = [asyncio.create_task(each.wait()) for each in ends]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if orders.drain.is_set() and not orders.stop.is_set():
            self.backend.leave()
            await _drain(surfaces, stopping, orders.drain_s)
        for each in waiting:
            each.cancel()
        return 1 if self.backend.refused.is_set() else 0


async def open_or_stop(opening: Coroutine[Any, Any, Surfaces], orders: Orders) -> Surfaces | None:
    """The surfaces once they are open; None when an order to end comes first."""
    task = asyncio.create_task(opening)
    waiting = [asyncio.create_task(each.wait()) for each in (orders.stop, orders.drain)]
    await asyncio.wait({task, *waiting}, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


async def _serve(settings: Settings, run: RunFolder, listener: socket.socket) -> int:
    orders = Orders()
    orders.follow()
    limits, tls = _own_share(CallLimits.of(settings), settings.edges), ServerTls.of(settings)

    def find_model(_: RemoteBackend) -> tuple[Settings, PreparedModel]:
        return settings, PreparedModel.from_json(run.prepared.read_text())

    edge = EdgeServer(LocalFront(run.path), limits, tls, find_model, listener)
    async with contextlib.AsyncExitStack() as stack:
        while not run.prepared.exists() and not orders.stop.is_set():
            await asyncio.sleep(PREPARED_POLL_S)
        surfaces = await open_or_stop(edge.open(stack, lambda processor: check_text(processor, run)), orders)
        if surfaces is None:
            return 0
        run.note("serving")
        return await edge.serve(surfaces, orders)
    raise AssertionError("unreachable: the block above returns or raises")


async def _drain(surfaces: Surfaces, stopping: "asyncio.Task[bool]", drain_s: float) -> None:
    """Serve what is open to its end. What has not ended within `drain_s` seconds loses this process at once: cancelled
    calls would be the ends of their requests, those of an edge that dies run on."""
    ended = asyncio.create_task(surfaces.stop(drain_s + CANCEL_LATE_S))
    await asyncio.wait({ended, stopping}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done() and not stopping.done():
        os._exit(0)
    await ended


def _own_share(limits: CallLimits, edges: int) -> CallLimits:
    """The limits of one of several edges: together they have as many streams as the settings allow."""
    return dataclasses.replace(limits, max_streams=math.ceil(limits.max_streams / edges))
