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

from serving.api.surfaces import Ports, Surfaces, open_surfaces, raise_file_limit
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.core.canary_text import check_text
from serving.core.request_processor import RequestProcessor
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


def serve(settings: Settings, run: RunFolder, listener: socket.socket) -> int:
    """Serve until standard input ends. `listener` is the socket of HTTP. Returns the exit status: 1 when the surfaces
    cannot be opened, or when the front speaks another version."""
    logs.configure(settings.log_format, settings.log_level)
    raise_file_limit()
    try:
        return asyncio.run(_serve(settings, run, listener))
    except MoejaxError as error:
        logs.SERVER.error("%s", error)
        return 1


class Orders:
    """The orders of the supervisor, as lines of the standard input of this edge."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        """Set when the input has ended: the edge ends."""
        self.drain = asyncio.Event()
        self.drain_s = 0.0
        """Seconds that streams have to end, once `drain` is set."""

    def follow(self) -> None:
        """Read the input as it comes, in the running event loop."""
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


async def _serve(settings: Settings, run: RunFolder, listener: socket.socket) -> int:
    orders = Orders()
    orders.follow()
    limits, tls = _own_share(CallLimits.of(settings), settings.edges), ServerTls.of(settings)
    opening = asyncio.create_task(_open(settings, run, listener, limits, tls))
    stopping = asyncio.create_task(orders.stop.wait())
    await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        return 0
    stack, backend, surfaces = opening.result()
    async with stack:
        run.note("serving")
        refused = asyncio.create_task(backend.refused.wait())
        draining = asyncio.create_task(orders.drain.wait())
        await asyncio.wait({refused, stopping, draining}, return_when=asyncio.FIRST_COMPLETED)
        refused.cancel()
        draining.cancel()
        if orders.drain.is_set() and not orders.stop.is_set():
            await _drain(surfaces, stopping, orders.drain_s)
        return 1 if backend.refused.is_set() else 0
    raise AssertionError("unreachable: the block above returns or raises")


async def _drain(surfaces: Surfaces, stopping: "asyncio.Task[bool]", drain_s: float) -> None:
    """Serve what is open to its end. What has not ended within `drain_s` seconds loses this process at once: cancelled
    calls would be the ends of their requests, those of an edge that dies run on."""
    ended = asyncio.create_task(surfaces.stop(drain_s + CANCEL_LATE_S))
    await asyncio.wait({ended, stopping}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done() and not stopping.done():
        os._exit(0)
    await ended


async def _open(
    settings: Settings, run: RunFolder, listener: socket.socket, limits: CallLimits, tls: ServerTls | None
) -> tuple[contextlib.AsyncExitStack, RemoteBackend, Surfaces]:
    """Open the surfaces once a front is there, and once this edge has answered its canary. The stack closes them."""
    while not run.prepared.exists():
        await asyncio.sleep(PREPARED_POLL_S)
    model = PreparedModel.from_json(run.prepared.read_text())
    model = model.with_context(settings.max_context, lambda _: None).with_known_tokens(lambda _: None)
    tokenizer, defaults = load_tokenizer(settings, model), load_defaults(settings, model)
    async with contextlib.AsyncExitStack() as stack:
        backend = RemoteBackend(run.path)
        stack.push_async_callback(backend.close)
        await backend.open()
        tracer = None
        if settings.otlp_endpoint is not None:
            tracer = open_tracer(settings.otlp_endpoint)
            stack.callback(tracer.close)
        processor = RequestProcessor(
            backend,
            tokenizer,
            Metrics(backend, tracer),
            max_prompt_tokens=settings.max_prompt_tokens,
            sampling_defaults=defaults,
        )
        ports = Ports(grpc=settings.grpc_port, http=settings.http_port)
        await check_text(processor, run)
        surfaces = await open_surfaces(stack, processor, settings, limits, tls, ports, listener)
        backend.serve()
        return stack.pop_all(), backend, surfaces
    raise AssertionError("unreachable: the block above returns or raises")


def _own_share(limits: CallLimits, edges: int) -> CallLimits:
    """The limits of one of several edges: together they have as many streams as the settings allow."""
    return dataclasses.replace(limits, max_streams=math.ceil(limits.max_streams / edges))
