"""Settings of the addresses where clients reach the server."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting


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
    vllm_grpc: bool = setting(
        False, "Serve vllm.grpc.engine.VllmEngine on the gRPC port too (needs the extra moejax[vllm])."
    )

    @property
    def loopback(self) -> bool:
        """True when only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """True when only this machine can reach what listens on this address."""
    return host in ("localhost", "::1") or host.startswith("127.")
