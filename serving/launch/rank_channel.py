"""The way from a rank, or from who keeps a place for one, to the front."""

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import grpc

from serving.rank_listener import OPTIONS
from serving.rank_process import FRONT
from serving.tls import ClientTls

CA, CERT, KEY, ADDRESS = "MOEJAX_LINK_CA", "MOEJAX_LINK_CERT", "MOEJAX_LINK_KEY", "MOEJAX_LINK_ADDRESS"
"""Environment variables that a rank elsewhere is started with: files of TLS, and where other ranks reach it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """`front` is host:port, where it listens for ranks; `address` that at which other ranks reach this machine."""

    front: str
    address: str
    tls: ClientTls | None = None

    @classmethod
    def given(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """As a rank is told it; of a rank of the front's own machine, nothing leaves that."""
        ca, cert, key = (Path(environment[name]) if name in environment else None for name in (CA, CERT, KEY))
        tls = ClientTls(ca=ca, cert=cert, key=key) if ca or cert else None
        return cls(front=environment[FRONT], address=environment.get(ADDRESS, "127.0.0.1"), tls=tls)

    def variables(self) -> dict[str, str]:
        """What a rank must be told, beside its front, to find the same way."""
        files = {CA: self.tls.ca, CERT: self.tls.cert, KEY: self.tls.key} if self.tls is not None else {}
        return {ADDRESS: self.address} | {name: str(path) for name, path in files.items() if path is not None}

    def channel(self) -> grpc.Channel:
        """A channel to the front for a rank."""
        if self.tls is None:
            return grpc.insecure_channel(self.front, options=OPTIONS)
        return grpc.secure_channel(self.front, self.tls.grpc(), options=OPTIONS)

    def aio_channel(self) -> grpc.aio.Channel:
        """A channel to the front for who keeps places."""
        if self.tls is None:
            return grpc.aio.insecure_channel(self.front, options=OPTIONS)
        return grpc.aio.secure_channel(self.front, self.tls.grpc(), options=OPTIONS)

    def beside_the_front(self, address: str) -> str:
        """An address that may lack its host (":port"): then it is where the front is."""
        return address if not address.startswith(":") else self.front.rpartition(":")[0] + address


def address_towards(front: str) -> str:
    """The address of this machine that packets to `front` (host:port) leave from. Raises OSError."""
    host, _, port = front.rpartition(":")
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a datagram socket sends nothing
        probe.connect(address)
        return probe.getsockname()[0]
