"""Commands of hosts that join a server: keeping places for its ranks, and the tokens that let them in."""

import asyncio
import datetime
import os
import signal
import socket
import time
from pathlib import Path

import click

from serving import logs
from serving.config import is_loopback
from serving.dial import Way, address_towards
from serving.errors import InvalidRequest
from serving.join_tokens import JoinTokens, read_secret
from serving.keeper import Offer, keep
from serving.options import example
from serving.tls import ClientTls

_DAY_S = 86400.0

_pem = click.Path(exists=True, dir_okay=False, path_type=Path)
_file = click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="MOEJAX_RANK_TOKENS",
    required=True,
    help="The file of tokens that `serve --rank-tokens` reads; also MOEJAX_RANK_TOKENS.",
)


@click.command()
@click.option("--join", required=True, metavar="HOST:PORT", help="Where the front listens for ranks (--rank-listen).")
@click.option(
    "--token-file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="MOEJAX_TOKEN_FILE",
    help="File with the secret that `moejax tokens add` printed; nobody else may read it.",
)
@click.option("--host", help="The host this counts as: its ranks can be lost together.  [default: its name]")
@click.option("--rack", default="", help="The rack it counts as being in.")
@click.option("--model", help="Where this host has the model, if not where the front has it.")
@click.option("--count", type=click.IntRange(1, 64), default=1, show_default=True, help="Ranks to keep places for.")
@click.option("--address", help="Where other ranks reach this host.  [default: from where it reaches the front]")
@click.option("--ca", type=_pem, envvar="MOEJAX_CA", help="Use TLS and trust this authority (PEM).")
@click.option("--cert", type=_pem, envvar="MOEJAX_CLIENT_CERT", help="Certificate to show to the front.")
@click.option("--key", type=_pem, envvar="MOEJAX_CLIENT_KEY", help="Private key of --cert.")
@click.option("--plaintext", is_flag=True, help="Dial over a network without TLS.")
@example(
    "moejax rank --join front.example:50052 --token-file token --ca ca.pem",
    "moejax rank --join 127.0.0.1:50052 --token-file token --count 4",
)
def rank(
    join: str,
    token_file: Path,
    host: str | None,
    rack: str,
    model: str | None,
    count: int,
    address: str | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    plaintext: bool,
) -> None:
    """Let this host's devices serve as ranks of the front at HOST:PORT, until Ctrl-C.

    Dials until it is let in, and again whenever the front is gone. Everything else the front says.
    """
    name, _, port = join.rpartition(":")
    if not (name and port.isdecimal()):
        raise InvalidRequest(f"--join is {join!r}; it must be HOST:PORT.", param="join")
    tls = ClientTls(ca=ca, cert=cert, key=key) if ca or cert or key else None
    if tls is None and not plaintext and not is_loopback(name):
        raise InvalidRequest(
            f"{join} would be dialled without TLS, and whoever is on the way could take the join token. Give --ca, "
            "or --plaintext on a network of yours.",
            param="ca",
        )
    logs.configure("text", "info")
    way = Way(front=join, address=address or _address(join), tls=tls)
    cores = len(os.sched_getaffinity(0))
    offers = [
        Offer(
            secret=read_secret(token_file),
            host=host or socket.gethostname(),
            rack=rack,
            model=model,
            threads=max(1, cores // count),
            device=number if count > 1 else None,
        )
        for number in range(count)
    ]
    asyncio.run(_until_told(way, offers))


async def _until_told(way: Way, offers: list[Offer]) -> None:
    keeping = asyncio.ensure_future(keep(way, offers, logs.SERVER.info))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, keeping.cancel)
    await asyncio.wait([keeping])
    keeping.result()


def _address(front: str) -> str:
    """Where others reach this host. A name that is not known yet may be in a while: pods start in any order."""
    told = False
    while True:
        try:
            return address_towards(front)
        except OSError as error:
            if not told:
                logs.SERVER.info("%s: %s; trying again", front, error.strerror or error)
            told = True
            time.sleep(1.0)


@click.group()
@example("moejax tokens add pods --file tokens.json > token", "moejax serve --launcher join --rank-tokens tokens.json")
def tokens() -> None:
    """Make, list and remove join tokens, which let ranks on other hosts in. A running server notices at once."""


@tokens.command("add")
@click.argument("name")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Days it counts for.  [default: for ever]")
@_file
@example("(umask 077; moejax tokens add pods --file tokens.json --days 30 > token)")
def add_token(name: str, days: float | None, file: Path) -> None:
    """Make a token called NAME and print its secret. It is shown this once; the file keeps its hash."""
    click.echo(JoinTokens(file).add(name, valid_s=None if days is None else days * _DAY_S))


@tokens.command("list")
@_file
@example("moejax tokens list --file tokens.json")
def list_tokens(file: Path) -> None:
    """List the tokens by name."""
    for token in JoinTokens(file).entries():
        expires = "" if token.expires is None else f"until {_day(token.expires)}"
        click.echo(f"{token.name:<24} {_day(token.created)}  {expires}".rstrip())


@tokens.command("remove")
@click.argument("name")
@_file
@example("moejax tokens remove pods --file tokens.json")
def remove_token(name: str, file: Path) -> None:
    """Forget the token called NAME. Ranks that it let in stay until they end."""
    JoinTokens(file).remove(name)
    click.echo(f"removed {name}")


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
