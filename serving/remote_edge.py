"""Serves clients in an edge on another host than the front, until a signal ends it (`moejax edge`).

It finds the front by its address and shows it a token, gets the model's numbers and the settings of answers from it,
and has only the tokenizer's files on its own host. A front that dies is a pause; a server that ends leaves this edge
waiting for the next one, not ready meanwhile.
"""

import asyncio
import contextlib
import dataclasses
import signal
import tempfile
from pathlib import Path

from serving.api.surfaces import Ports
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.edge import EdgeServer, Orders, open_or_stop, run_edge
from serving.edges.front_dialer import RemoteFront
from serving.edges.remote_backend import RemoteBackend
from serving.errors import StartError
from serving.observability import logs
from serving.protocol.prepared_model import PreparedModel


def serve(settings: Settings, front: RemoteFront, folder: str | None) -> int:
    """Serve until SIGINT or SIGTERM, then let open streams end for `grace_s` seconds. `folder` is the model's on this
    host, None where it is as on the front's. Returns the exit status: 1 when the front refuses this edge, or when its
    ports cannot be opened."""
    return run_edge(settings, lambda: _serve(settings, front, folder))


async def _serve(settings: Settings, front: RemoteFront, folder: str | None) -> int:
    orders, log = Orders(), logs.SERVER.info
    orders.drain_s = settings.grace_s
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, orders.drain.set)
    log("looking for the front at %s", front.address)
    async with contextlib.AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moejax-edge-")))

        def find_model(backend: RemoteBackend) -> tuple[Settings, PreparedModel]:
            if backend.served is None:
                raise StartError(
                    f"{front.address} is a front without edges on other hosts. Start it with --edge-listen."
                )
            model, values = backend.served.model(folder, scratch)
            return dataclasses.replace(settings, **values), model

        edge = EdgeServer(front, CallLimits.of(settings), ServerTls.of(settings), find_model)
        surfaces = await open_or_stop(edge.open(stack), orders)
        if surfaces is None:
            return 0
        _announce(settings, surfaces.ports, f"edge of {front.address} for {edge.backend.model.name}")
        code = await edge.serve(surfaces, orders)
        log("stopped")
        return code
    raise AssertionError("unreachable: the block above returns or raises")


def _announce(settings: Settings, ports: Ports, title: str) -> None:
    log, scheme = logs.SERVER.info, "https" if settings.tls_cert else "http"
    log(f"ready: {title}")
    log(f"gRPC   {settings.host}:{ports.grpc}")
    log(f"HTTP   {scheme}://{settings.host}:{ports.http}")
    if not settings.loopback and settings.api_keys is None:
        logs.SERVER.warning(
            "anybody who reaches %s can call this edge. Set --api-keys (docs/security.md).", settings.host
        )
