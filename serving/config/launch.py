"""Settings of how rank processes are started, here or on other hosts."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, check_tls, setting
from serving.config.network import is_address, is_loopback
from serving.errors import InvalidRequest

LAUNCHERS = ("local", "join", "ray")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchSettings(SettingsGroup):
    """Who starts rank processes, and how ranks on other hosts connect."""

    title: ClassVar[str] = "Launching ranks"

    launcher: str = setting(
        "local",
        "Who starts the rank processes: this server (local), hosts that run `moejax rank --join` (join), or a Ray "
        "cluster (ray; needs the extra moejax[ray]).",
        choices=LAUNCHERS,
    )
    start_timeout_s: float = setting(600.0, "Most seconds from the start until the server is ready; then it gives up.")
    ray_address: str = setting("auto", "Address of the Ray cluster that starts ranks, with launcher ray.")
    rank_listen: str = setting(
        "127.0.0.1:50052", "host:port that ranks on other hosts connect to, with launcher join or ray."
    )
    rank_tokens: str | None = setting(
        None, "File of join tokens that let ranks on other hosts in (`moejax tokens add` makes one)."
    )
    rank_tls_cert: str | None = setting(
        None, "Certificate chain (PEM file) of --rank-listen and --edge-listen; needs --rank-tls-key."
    )
    rank_tls_key: str | None = setting(None, "Private key (PEM file) of --rank-tls-cert.")
    rank_tls_client_ca: str | None = setting(
        None, "Authority (PEM file) that must have signed the certificate of each rank and edge (mutual TLS)."
    )
    rank_plaintext: bool = setting(
        False, "Let ranks and edges on other hosts connect without TLS, on a network that you trust."
    )

    def check(self) -> None:
        """Check fields of this group against each other. Raises InvalidRequest."""
        check_tls(self, "rank_")
        host = self.rank_listen.rpartition(":")[0]
        if not is_address(self.rank_listen):
            raise InvalidRequest(f"rank_listen is {self.rank_listen!r}; it must be host:port.", param="rank_listen")
        if self.launcher == "local":
            return
        if self.launcher == "join" and self.rank_tokens is None:
            raise InvalidRequest(
                "launcher join needs rank_tokens: who may be a rank. Make one with `moejax tokens add NAME --file F`.",
                param="rank_tokens",
            )
        if self.rank_tls_cert is None and not self.rank_plaintext and not is_loopback(host):
            raise InvalidRequest(
                f"rank_listen is {self.rank_listen}, and without TLS anybody on the way can read what is served and "
                "take the join token. Give rank_tls_cert and rank_tls_key; or, on a network of yours, rank_plaintext.",
                param="rank_tls_cert",
            )
