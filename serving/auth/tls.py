"""TLS files of the servers (HTTP, gRPC, and where ranks dial in), and of their clients."""

import dataclasses
import ssl
from pathlib import Path
from typing import Any, Self

import grpc

from serving.config import LaunchSettings, SecuritySettings
from serving.errors import InvalidRequest, StartError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerTls:
    """PEM files of a server. With `client_ca` clients need a certificate of that authority."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def of(cls, settings: SecuritySettings) -> Self | None:
        """The files that the settings name for HTTP and gRPC; None without TLS. Raises StartError when a file is
        missing or wrong."""
        return cls._from(settings.tls_cert, settings.tls_key, settings.tls_client_ca)

    @classmethod
    def of_ranks(cls, settings: LaunchSettings) -> Self | None:
        """The files that the settings name for the ports where ranks and edges of other hosts dial in."""
        return cls._from(settings.rank_tls_cert, settings.rank_tls_key, settings.rank_tls_client_ca)

    @classmethod
    def _from(cls, cert: str | None, key: str | None, ca: str | None) -> Self | None:
        if cert is None or key is None:
            return None
        made = cls(cert=Path(cert), key=Path(key), client_ca=Path(ca) if ca else None)
        made.check()
        return made

    def check(self) -> None:
        """Raise StartError naming the file that cannot be used: uvicorn and gRPC would not name it."""
        for path in (self.cert, self.key, self.client_ca):
            if path is not None:
                _bytes(path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key)
        except (ssl.SSLError, ValueError) as error:
            raise StartError(f"{self.cert} and {self.key} are no certificate with its key: {error}.") from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, ValueError) as error:
                raise StartError(f"{self.client_ca} holds no certificate of an authority: {error}.") from None

    def uvicorn(self) -> dict[str, Any]:
        """Options for uvicorn."""
        options: dict[str, Any] = {"ssl_certfile": str(self.cert), "ssl_keyfile": str(self.key)}
        if self.client_ca is not None:
            options |= {"ssl_ca_certs": str(self.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return options

    def context(self) -> ssl.SSLContext:
        """A context for a port of this process's event loop."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def grpc(self) -> grpc.ServerCredentials:
        """Credentials for a gRPC port."""
        return grpc.ssl_server_credentials(
            [(_bytes(self.key), _bytes(self.cert))],
            root_certificates=None if self.client_ca is None else _bytes(self.client_ca),
            require_client_auth=self.client_ca is not None,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientTls:
    """PEM files of a client: the authority it trusts (`ca`), and its certificate with its key for mutual TLS."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidRequest("a client certificate needs both its certificate and its key.", param="cert")

    def context(self) -> ssl.SSLContext:
        """A context for a connection of this process's event loop. Without `ca` it trusts the authorities of the
        system. Raises StartError naming the file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (OSError, ValueError) as error:
            raise StartError(f"{self.ca} holds no certificate of an authority: {error}.") from None
        if self.cert is not None and self.key is not None:
            try:
                context.load_cert_chain(self.cert, self.key)
            except (OSError, ValueError) as error:
                raise StartError(f"{self.cert} and {self.key} are no certificate with its key: {error}.") from None
        return context

    def grpc(self) -> grpc.ChannelCredentials:
        """Credentials for a channel. Without `ca`, the client trusts gRPC's own authorities."""
        return grpc.ssl_channel_credentials(
            root_certificates=None if self.ca is None else _bytes(self.ca),
            private_key=None if self.key is None else _bytes(self.key),
            certificate_chain=None if self.cert is None else _bytes(self.cert),
        )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}.") from None
