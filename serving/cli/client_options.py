"""Options for the connection to a server, apart from commands that need no client."""

import functools
from pathlib import Path
from typing import Any

import click

from serving.api.client import DEFAULT_ADDRESS, Client
from serving.auth.tls import ClientTls
from serving.cli.options import Command


def client_options(function: Command) -> Command:
    """Options for the connection to a running server. The command gets a `client`."""

    @functools.wraps(function)
    def call(
        server: str,
        api_key: str | None,
        ca: Path | None,
        client_cert: Path | None,
        client_key: Path | None,
        **given: Any,
    ) -> Any:
        secure = ca is not None or client_cert is not None or client_key is not None
        tls = ClientTls(ca=ca, cert=client_cert, key=client_key) if secure else None
        with Client(server, api_key=api_key, tls=tls) as client:
            return function(client=client, **given)

    pem = click.Path(exists=True, dir_okay=False, path_type=Path)
    wrapped: Command = call
    for option in (
        click.option("--client-key", type=pem, envvar="MOEJAX_CLIENT_KEY", help="Private key of --client-cert (PEM)."),
        click.option(
            "--client-cert", type=pem, envvar="MOEJAX_CLIENT_CERT", help="Certificate that this client presents (PEM)."
        ),
        click.option("--ca", type=pem, envvar="MOEJAX_CA", help="Use TLS and trust this certificate authority (PEM)."),
        click.option("--api-key", envvar="MOEJAX_API_KEY", metavar="KEY", help="API key, if the server requires one."),
        click.option(
            "--server",
            default=DEFAULT_ADDRESS,
            show_default=True,
            envvar="MOEJAX_SERVER",
            metavar="HOST:PORT",
            help="gRPC address of a running server.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped
