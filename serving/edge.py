"""Serves clients in an edge: gRPC and HTTP over the front of the run folder, until the supervisor ends it."""

import asyncio
import contextlib
import dataclasses
import math
import socket
import sys

from serving.api.surfaces import Ports, open_surfaces, raise_file_limit
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.core.request_processor import RequestProcessor
from serving.edges.remote_backend import RemoteBackend
from serving.errors import MoejaxError
from serving.launch.run_folder import RunFolder
from serving.observability import logs
from serving.observability.metrics import Metrics
from serving.observability.tracing import open_tracer
from serving.protocol.prepared_model import PreparedModel
from serving.text.model_files import load_defaults, load_tokenizer

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


async def _serve(settings: Settings, run: RunFolder, listener: socket.socket) -> int:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)
    limits, tls = _own_share(CallLimits.of(settings), settings.edges), ServerTls.of(settings)
    opening = asyncio.create_task(_open(settings, run, listener, limits, tls))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        return 0
    stack, backend = opening.result()
    async with stack:
        refused = asyncio.create_task(backend.refused.wait())
        await asyncio.wait({refused, stopping}, return_when=asyncio.FIRST_COMPLETED)
        refused.cancel()
        return 1 if backend.refused.is_set() else 0


async def _open(
    settings: Settings, run: RunFolder, listener: socket.socket, limits: CallLimits, tls: ServerTls | None
) -> tuple[contextlib.AsyncExitStack, RemoteBackend]:
    """Open the surfaces once a front is there. The stack closes them."""
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
        await open_surfaces(stack, processor, settings, limits, tls, ports, listener)
        backend.serve()
        return stack.pop_all(), backend
    raise AssertionError("unreachable: the block above returns or raises")


def _own_share(limits: CallLimits, edges: int) -> CallLimits:
    """The limits of one of several edges: together they have as many streams as the settings allow."""
    return dataclasses.replace(limits, max_streams=math.ceil(limits.max_streams / edges))
