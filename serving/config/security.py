"""Settings of who may call the server, and how much."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, check_tls, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecuritySettings(SettingsGroup):
    """API keys, TLS for clients, and limits on what a client may send."""

    title: ClassVar[str] = "Security and limits"

    api_keys: str | None = setting(
        None, "File of API keys (`moejax keys add` makes one). Without it everybody may call the server."
    )
    tls_cert: str | None = setting(None, "Certificate chain (PEM file) of HTTP and gRPC; needs --tls-key.")
    tls_key: str | None = setting(None, "Private key (PEM file) of --tls-cert.")
    tls_client_ca: str | None = setting(
        None, "Authority (PEM file) that must have signed the certificate of each client (mutual TLS)."
    )
    max_body_bytes: int = setting(4 << 20, "Most bytes of an HTTP body or a gRPC message from a client.", more_than=0)
    max_header_bytes: int = setting(
        16 << 10, "Most bytes of the HTTP headers or the gRPC metadata of a call.", more_than=0
    )
    max_streams: int = setting(4096, "Most generating calls at the same time, HTTP and gRPC together.", more_than=0)
    slow_client_s: float = setting(
        60.0, "Most seconds that a client may take to send its body, or to read what waits for it.", more_than=0
    )
    chaos: bool = setting(False, "Let clients kill ranks and damage weights, for tests and demonstrations.")
    operate: bool = setting(
        False,
        "Let callers on this machine change the server: drain and scale ranks, pause, move experts, bring in new "
        "weights, upgrade, and report device errors.",
    )

    def check(self) -> None:
        """Check fields of this group against each other. Raises InvalidRequest."""
        check_tls(self, "")
