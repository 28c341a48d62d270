"""Opens the surfaces of a server: gRPC and HTTP over one request processor."""

import asyncio
import contextlib
import dataclasses
import resource
import socket

from serving.api.grpc.server import GrpcServer, start_grpc
from serving.api.http.server import HttpServer, start_http
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.core.request_processor import RequestProcessor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ports:
    """The ports of a server, those in use also where 0 was asked for."""

    grpc: int
    http: int


LINGER_S = 2.0
"""Seconds after a request in which clients of an edge that is replaced can send another one over its connection."""


@dataclasses.dataclass(frozen=True)
class Surfaces:
    """The surfaces that are open."""

    grpc: GrpcServer
    http: HttpServer

    @property
    def ports(self) -> Ports:
        """Their ports."""
        return Ports(grpc=self.grpc.port, http=self.http.port)

    async def stop(self, grace_s: float) -> None:
        """Accept no more connections and calls, and wait until all open calls have ended, or are cancelled after
        `grace_s` seconds. Connections of HTTP without a request are closed after LINGER_S."""
        await asyncio.gather(self.grpc.stop(grace_s), self.http.stop(grace_s, linger_s=min(LINGER_S, grace_s)))


async def open_surfaces(
    stack: contextlib.AsyncExitStack,
    processor: RequestProcessor,
    settings: Settings,
    limits: CallLimits,
    tls: ServerTls | None,
    ports: Ports,
    listener: socket.socket | None = None,
) -> Surfaces:
    """Start gRPC and HTTP; `stack` stops them. With `listener`, the socket of HTTP, other processes serve at the same
    ports."""
    grpc_server = await start_grpc(
        processor,
        host=settings.host,
        port=ports.grpc,
        limits=limits,
        tls=tls,
        vllm=settings.vllm_grpc,
        shared=listener is not None,
    )
    stack.push_async_callback(grpc_server.stop, 1.0)
    http_server = await start_http(
        processor, host=settings.host, port=ports.http, limits=limits, tls=tls, settings=settings, listener=listener
    )
    stack.push_async_callback(http_server.stop, 1.0)
    return Surfaces(grpc_server, http_server)


def raise_file_limit() -> None:
    """Raise the limit on open files: every stream needs a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))
