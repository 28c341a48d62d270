"""Settings of the addresses where clients reach the server."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting
from serving.errors import InvalidRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings(SettingsGroup):
    """Where the server listens for clients."""

    title: ClassVar[str] = "Network"

    host: str = setting(
        "127.0.0.1",
        "Address that HTTP and gRPC listen on; 0.0.0.0 is every interface. Use API keys with anything but loopback.",
    )
    grpc_port: int = setting(50051, "TCP port of gRPC; 0 takes a free one.", port=True)
    http_port: int = setting(8000, "TCP port of HTTP (API, dashboard and metrics); 0 takes a free one.", port=True)
    edges: int = setting(
        1,
        "Processes that hold the clients' connections, so that these outlive the front; they share both ports. "
        "0: the front holds them, as it does in a server inside a program.",
        at_least=0,
    )
    edge_listen: str | None = setting(
        None,
        "host:port that edges on other hosts connect to (`moejax edge`), with the TLS files of ranks (--rank-tls-cert "
        "and so on). Default: there are no such edges.",
    )
    edge_tokens: str | None = setting(
        None,
        "File of join tokens that let edges on other hosts in (`moejax tokens add` makes one). Do not give them the "
        "tokens of ranks: a rank sees all prompts and answers.",
    )
    vllm_grpc: bool = setting(
        False, "Serve vllm.grpc.engine.VllmEngine on the gRPC port too (needs the extra moejax[vllm])."
    )

    def check(self) -> None:
        """Check fields of this group against each other. Raises InvalidRequest."""
        if self.edge_listen is None:
            if self.edge_tokens is not None:
                raise InvalidRequest(
                    "edge_tokens is given without edge_listen: no edge on another host can connect. Give both.",
                    param="edge_listen",
                )
            return
        if not is_address(self.edge_listen):
            raise InvalidRequest(f"edge_listen is {self.edge_listen!r}; it must be host:port.", param="edge_listen")
        if self.edge_tokens is None:
            raise InvalidRequest(
                "edge_listen needs edge_tokens: who may be an edge. Make one with `moejax tokens add NAME --file F`.",
                param="edge_tokens",
            )
        if not self.edges:
            raise InvalidRequest(
                f"edge_listen is {self.edge_listen} with edges 0: a front that holds connections of clients itself "
                "serves no edges. Set edges to 1 or more.",
                param="edges",
            )

    @property
    def loopback(self) -> bool:
        """True when only this machine can reach the server."""
        return is_loopback(self.host)


def is_address(text: str) -> bool:
    """True for host:port."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and int(port) <= 65535


def split_address(text: str) -> tuple[str, int]:
    """Host and port of host:port, without the brackets of an IPv6 address."""
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """True when only this machine can reach what listens on this address."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")
