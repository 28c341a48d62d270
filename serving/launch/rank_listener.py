"""The gRPC server that ranks and host agents dial: its address, and how soon either end notices a broken connection."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

import grpc

from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.errors import StartError
from serving.proto.moejax.v1 import link_pb2

T = TypeVar("T")

SERVICE = link_pb2.DESCRIPTOR.services_by_name["RankLink"].full_name
MESSAGE_BYTES = 64 << 20
KEEPALIVE_MS = 2000
"""A connection that was silent for so long is pinged, and given up after as long again without an answer."""
HELLO_TIMEOUT_S = 10.0
"""Seconds within which a caller must send its first message, which says who it is."""
HEARTBEAT_METADATA = "moejax-heartbeat-s"
"""Key in the initial metadata of a stream to a rank: seconds between two heartbeats that the front wants."""
HEARTBEAT_S = Settings.heartbeat_s
"""The interval where a front does not send one."""
GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)
"""Channel options of both ends of the streams between the front and its ranks and host agents."""


class AttachService(Protocol):
    """Serves the streams of ranks: `serving.executor.executor`."""

    def Attach(self, reports: AsyncIterator[link_pb2.Report], context: Any) -> AsyncIterator[link_pb2.Command]:
        """The stream of one rank."""
        ...


class ListeningServer(Protocol):
    """A server that listens for ranks."""

    async def stop(self, grace: float | None) -> None:
        """Stop after so many seconds."""
        ...


RelayMethod = Callable[[AsyncIterator[link_pb2.HostReport], Any], AsyncIterator[link_pb2.HostCommands]]
"""Serves the streams of host agents that pass on those of their ranks: `serving.executor.host_service`."""


class KeepService(Protocol):
    """Serves the streams of host agents: `serving.launch.host_pool`."""

    def Keep(self, reports: AsyncIterator[link_pb2.PlaceReport], context: Any) -> AsyncIterator[link_pb2.PlaceOrder]:
        """The stream of one host slot."""
        ...

    def refusal_of(self, hello: link_pb2.HostHello, peer: str) -> tuple[grpc.StatusCode, str] | None:
        """Why a host agent may not pass on streams of ranks; None if it may."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankListener:
    """Where the front listens for ranks. `address` is host:port, where port 0 takes a free one, or unix:PATH. Host
    agents are served only with a `host_pool`. Ranks send a heartbeat every `heartbeat_s` seconds."""

    address: str = "127.0.0.1:0"
    tls: ServerTls | None = None
    host_pool: KeepService | None = None
    heartbeat_s: float = HEARTBEAT_S

    @property
    def _is_local(self) -> bool:
        return self.address.startswith("unix:")

    @property
    def stream_metadata(self) -> tuple[tuple[str, str], ...]:
        """The initial metadata of a stream to a rank."""
        return ((HEARTBEAT_METADATA, str(self.heartbeat_s)),)

    async def open(self, executor: AttachService, relay: RelayMethod | None = None) -> tuple[grpc.aio.Server, str]:
        """Start the server; `relay` serves host agents, if there is a host pool. Returns it and its address, with the
        port it got. Raises StartError when the address cannot be used."""
        server = grpc.aio.server(options=GRPC_OPTIONS)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Attach": grpc.stream_stream_rpc_method_handler(
                executor.Attach, link_pb2.Report.FromString, link_pb2.Command.SerializeToString
            )
        }
        if self.host_pool is not None:
            handlers["Keep"] = grpc.stream_stream_rpc_method_handler(
                self.host_pool.Keep, link_pb2.PlaceReport.FromString, link_pb2.PlaceOrder.SerializeToString
            )
        if self.host_pool is not None and relay is not None:
            handlers["Relay"] = grpc.stream_stream_rpc_method_handler(
                relay, link_pb2.HostReport.FromString, link_pb2.HostCommands.SerializeToString
            )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            if self.tls is None:
                port = server.add_insecure_port(self.address)
            else:
                port = server.add_secure_port(self.address, self.tls.grpc())
        except RuntimeError as error:
            raise StartError(
                f"cannot listen for ranks on {self.address}; another program has the port, or the address is not of "
                "this machine. Choose another with --rank-listen HOST:PORT."
            ) from error
        await server.start()
        return server, self.address if self._is_local else f"{self.address.rpartition(':')[0]}:{port}"


async def first_report(reports: AsyncIterator[T], context: Any) -> T:
    """The first message of a stream. Ends the call if none comes within HELLO_TIMEOUT_S."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            return await anext(aiter(reports))
    except (TimeoutError, StopAsyncIteration):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no first message came")
        raise AssertionError("unreachable: abort raises") from None
