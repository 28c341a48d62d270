"""Where ranks dial in: an address, who is let in there, and how soon a broken connection is noticed at either end."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any, Protocol, TypeVar

import grpc

from serving.errors import StartError
from serving.proto.moejax.v1 import link_pb2
from serving.tls import ServerTls

T = TypeVar("T")

SERVICE = link_pb2.DESCRIPTOR.services_by_name["RankLink"].full_name
MESSAGE_BYTES = 64 << 20
SILENT_MS = 2000
"""A connection on which nothing came for so long is asked for a sign of life, and given up after as long again."""
FIRST_S = 10.0
"""How long a caller may take to say who it is."""
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", SILENT_MS),
    ("grpc.keepalive_timeout_ms", SILENT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", SILENT_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)
"""Of both ends of the streams between the front, ranks and those who keep places for them."""


class Attaching(Protocol):
    """Who hears the ranks: see `serving.links`."""

    def Attach(self, reports: AsyncIterator[link_pb2.Report], context: Any) -> AsyncIterator[link_pb2.Command]:
        """A rank dials in."""
        ...


class Keeping(Protocol):
    """Who hears those who keep places: see `serving.places`."""

    def Keep(self, reports: AsyncIterator[link_pb2.PlaceReport], context: Any) -> AsyncIterator[link_pb2.PlaceOrder]:
        """A host offers a place."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankListener:
    """`address` is host:port, port 0 taking a free one, or unix:PATH. Places are offered only where somebody hears of
    them."""

    address: str = "127.0.0.1:0"
    tls: ServerTls | None = None
    places: Keeping | None = None

    @property
    def _local(self) -> bool:
        return self.address.startswith("unix:")

    async def open(self, links: Attaching) -> tuple[grpc.aio.Server, str]:
        """The server, and the address it has in the end. Raises StartError when it cannot be had."""
        server = grpc.aio.server(options=OPTIONS)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Attach": grpc.stream_stream_rpc_method_handler(
                links.Attach, link_pb2.Report.FromString, link_pb2.Command.SerializeToString
            )
        }
        if self.places is not None:
            handlers["Keep"] = grpc.stream_stream_rpc_method_handler(
                self.places.Keep, link_pb2.PlaceReport.FromString, link_pb2.PlaceOrder.SerializeToString
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
        return server, self.address if self._local else f"{self.address.rpartition(':')[0]}:{port}"


async def first_report(reports: AsyncIterator[T], context: Any) -> T:
    """The first message of a stream; one that does not come ends the call."""
    try:
        async with asyncio.timeout(FIRST_S):
            return await anext(aiter(reports))
    except (TimeoutError, StopAsyncIteration):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "nothing was said")
        raise AssertionError("unreachable: abort raises") from None
