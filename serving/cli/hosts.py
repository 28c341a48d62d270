"""The commands for hosts that join a server: `moejax rank` runs the host agent, `moejax tokens` edits join tokens."""

import asyncio
import datetime
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import click

from serving.auth.join_tokens import JoinTokens
from serving.cli.front_connection import FrontConnection, front_connection
from serving.cli.options import example
from serving.executor.host_relay import HostRelay, relaying
from serving.launch.host_agent import ORPHAN_TIMEOUT_S, SlotOffer, run_agents
from serving.launch.rank_channel import RankChannel, local_address_towards
from serving.observability import logs

_DAY_S = 86400.0

_file = click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="MOEJAX_RANK_TOKENS",
    required=True,
    help="The token file that `moejax serve` reads: --rank-tokens for ranks, --edge-tokens for edges. Also the "
    "variable MOEJAX_RANK_TOKENS.",
)


@click.command(short_help="Offer this host's devices to a server as ranks.")
@front_connection("join", "--rank-listen", "host", "the join token")
@click.option("--host", help="Name of this host in plans: its ranks can be lost together.  [default: the host name]")
@click.option("--rack", default="", help="Name of the rack of this host in plans.")
@click.option("--model", help="Folder of the model on this host.  [default: the same as on the front]")
@click.option(
    "--count",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Number of host slots to offer, one rank each.",
)
@click.option(
    "--address",
    help="Address at which other ranks reach this host.  [default: the address from which it reaches the front]",
)
@click.option(
    "--orphan-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=ORPHAN_TIMEOUT_S,
    show_default=True,
    help="Seconds that a rank waits for the next front when its front has gone, before the host agent ends it.",
)
@example(
    "moejax rank --join front.example:50052 --token-file token --ca ca.pem",
    "moejax rank --join 127.0.0.1:50052 --token-file token --count 4",
)
def rank(
    connection: FrontConnection,
    host: str | None,
    rack: str,
    model: str | None,
    count: int,
    address: str | None,
    orphan_timeout: float,
) -> None:
    """Offer the devices of this host as ranks to the front at HOST:PORT, until Ctrl-C.

    The command connects again whenever the front is gone. The front decides which ranks run here, with which settings.
    """
    logs.configure("text", "info")
    channel = RankChannel(
        front=connection.address, address=address or _own_address(connection.address), tls=connection.tls
    )
    cores = len(os.sched_getaffinity(0))
    offers = [
        SlotOffer(
            secret=connection.secret,
            host=host or socket.gethostname(),
            rack=rack,
            model=model,
            threads=max(1, cores // count),
            device=number if count > 1 else None,
            orphan_timeout_s=orphan_timeout,
        )
        for number in range(count)
    ]
    asyncio.run(_run_until_signal(channel, offers))


async def _run_until_signal(channel: RankChannel, offers: list[SlotOffer]) -> None:
    """Run the agents of these slots. With several, their ranks share one stream to the front (decision 0029)."""
    log, first = logs.SERVER.info, offers[0]
    with tempfile.TemporaryDirectory(prefix="moejax-host-") as folder:
        several = len(offers) > 1
        relay = HostRelay(channel, Path(folder), secret=first.secret, host=first.host, log=log) if several else None
        async with relaying(relay):
            agents = asyncio.ensure_future(run_agents(channel, offers, log, relay))
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, agents.cancel)
            await asyncio.wait([agents])
            agents.result()


def _own_address(front: str) -> str:
    """The address of this host as seen from the front. Waits until the name of the front resolves."""
    logged = False
    while True:
        try:
            return local_address_towards(front)
        except OSError as error:
            if not logged:
                logs.SERVER.info("%s: %s; trying again", front, error.strerror or error)
            logged = True
            time.sleep(1.0)


@click.group(short_help="Add, list and remove join tokens of hosts and edges.")
@example("moejax tokens add pods --file tokens.json > token", "moejax serve --launcher join --rank-tokens tokens.json")
def tokens() -> None:
    """Add, list and remove join tokens, with which other hosts join a server.

    A change takes effect at once, also in a running server.
    """


@tokens.command("add")
@click.argument("name")
@click.option(
    "--days",
    type=click.FloatRange(min=0, min_open=True),
    help="Days for which the token is valid.  [default: for ever]",
)
@_file
@example("(umask 077; moejax tokens add pods --file tokens.json --days 30 > token)")
def add_token(name: str, days: float | None, file: Path) -> None:
    """Add a token called NAME and print its secret. It is printed only now: the file keeps a hash of it."""
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
    """Remove the token called NAME. Hosts that have joined with it stay until the front ends."""
    JoinTokens(file).remove(name)
    click.echo(f"removed {name}")


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
