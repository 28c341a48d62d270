"""The gRPC channel to the front, of a rank or of a host agent."""

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import grpc

from serving.auth.tls import ClientTls
from serving.launch.rank_listener import GRPC_OPTIONS
from serving.launch.rank_process import ENV_FRONT

ENV_CA, ENV_CERT, ENV_KEY = "MOEJAX_LINK_CA", "MOEJAX_LINK_CERT", "MOEJAX_LINK_KEY"
ENV_ADDRESS = "MOEJAX_LINK_ADDRESS"
"""Environment variables of a rank on a joined host: TLS files, and the address at which other ranks reach it."""
ENV_RELAY = "MOEJAX_LINK_RELAY"
"""Environment variable of a rank whose host agent passes on its stream: the agent's socket, unix:PATH."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankChannel:
    """How this machine reaches the front and is reached. `front` is the host:port where the front listens for ranks,
    `address` the one at which other ranks reach this machine. With a `relay`, the socket of the host agent (unix:PATH),
    a rank attaches there instead."""

    front: str
    address: str
    tls: ClientTls | None = None
    relay: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The channel of a rank. Without an address in the environment the rank is on the front's own machine."""
        names = (ENV_CA, ENV_CERT, ENV_KEY)
        ca, cert, key = (Path(environment[name]) if name in environment else None for name in names)
        tls = ClientTls(ca=ca, cert=cert, key=key) if ca or cert else None
        return cls(
            front=environment[ENV_FRONT],
            address=environment.get(ENV_ADDRESS, "127.0.0.1"),
            tls=tls,
            relay=environment.get(ENV_RELAY, ""),
        )

    def variables(self) -> dict[str, str]:
        """The environment variables that make a rank open the same channel, except ENV_FRONT and ENV_RELAY."""
        files = {ENV_CA: self.tls.ca, ENV_CERT: self.tls.cert, ENV_KEY: self.tls.key} if self.tls is not None else {}
        return {ENV_ADDRESS: self.address} | {name: str(path) for name, path in files.items() if path is not None}

    def open(self) -> grpc.Channel:
        """Open a channel to where a rank attaches, for its threads."""
        if self.tls is None or self.relay:
            return grpc.insecure_channel(self.relay or self.front, options=GRPC_OPTIONS)
        return grpc.secure_channel(self.front, self.tls.grpc(), options=GRPC_OPTIONS)

    def open_aio(self) -> grpc.aio.Channel:
        """Open a channel to the front, for a host agent's event loop."""
        if self.tls is None:
            return grpc.aio.insecure_channel(self.front, options=GRPC_OPTIONS)
        return grpc.aio.secure_channel(self.front, self.tls.grpc(), options=GRPC_OPTIONS)

    def with_host(self, address: str) -> str:
        """The address host:port, with the front's host for one that has none (":port")."""
        return address if not address.startswith(":") else self.front.rpartition(":")[0] + address


def local_address_towards(front: str) -> str:
    """The address of this machine that packets to `front` (host:port) leave from. Raises OSError."""
    host, _, port = front.rpartition(":")
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a datagram socket sends nothing
        probe.connect(address)
        return probe.getsockname()[0]
