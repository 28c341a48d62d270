"""The options with which a host or an edge on another host connects to a front."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from serving.auth.join_tokens import read_secret
from serving.auth.tls import ClientTls
from serving.config import is_address, is_loopback, split_address
from serving.errors import InvalidRequest

_pem = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontConnection:
    """Where a front listens (`host:port`), the secret that lets this process in, and TLS; None for plaintext."""

    address: str
    secret: str
    tls: ClientTls | None


def front_connection(flag: str, listen: str, who: str, exposed: str) -> Callable[[Callable[..., Any]], Any]:
    """Add the options of a connection to the front, whose address is the option `--{flag}`; the command gets them as
    one argument `connection`. The front listens with its option `listen`, `who` connects, and without TLS others on the
    network could read `exposed`. The command raises InvalidRequest for an address that is none, and where neither TLS
    nor --plaintext is given for a front that is not on this machine."""
    options = (
        click.option(
            f"--{flag}",
            required=True,
            metavar="HOST:PORT",
            help=f"Address on which the front listens: its {listen}.",
        ),
        click.option(
            "--token-file",
            required=True,
            type=click.Path(dir_okay=False, path_type=Path),
            envvar="MOEJAX_TOKEN_FILE",
            help="File with the secret that `moejax tokens add` printed. Only its owner may read it.",
        ),
        click.option(
            "--ca", type=_pem, envvar="MOEJAX_CA", help="Use TLS to the front and trust this authority (PEM)."
        ),
        click.option(
            "--cert",
            type=_pem,
            envvar="MOEJAX_CLIENT_CERT",
            help=f"Certificate that this {who} presents to the front (PEM).",
        ),
        click.option("--key", type=_pem, envvar="MOEJAX_CLIENT_KEY", help="Private key of --cert (PEM)."),
        click.option("--plaintext", is_flag=True, help="Connect to the front over a network without TLS."),
    )

    def decorate(command: Callable[..., Any]) -> Any:
        @functools.wraps(command)
        def connected(
            *,
            token_file: Path,
            ca: Path | None,
            cert: Path | None,
            key: Path | None,
            plaintext: bool,
            **others: Any,
        ) -> Any:
            front = others.pop(flag)
            if not is_address(front):
                raise InvalidRequest(f"--{flag} is {front!r}; it must be HOST:PORT.", param=flag)
            tls = ClientTls(ca=ca, cert=cert, key=key) if ca or cert or key else None
            if tls is None and not plaintext and not is_loopback(split_address(front)[0]):
                raise InvalidRequest(
                    f"the connection to {front} would be without TLS, and others on the network could read {exposed}. "
                    "Give --ca, or --plaintext on a private network.",
                    param="ca",
                )
            return command(connection=FrontConnection(address=front, secret=read_secret(token_file), tls=tls), **others)

        return functools.reduce(lambda done, option: option(done), reversed(options), connected)

    return decorate
