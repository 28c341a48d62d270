"""The command that replaces the code of a running server: `moejax upgrade`."""

import sys
import time
from pathlib import Path

import click

from serving.api.client import Client
from serving.cli.client_options import client_options
from serving.cli.options import example
from serving.cli.printable import printable
from serving.errors import DeadlineExceeded, InvalidRequest, Unreachable
from serving.protocol.status import Status

POLL_S = 0.2
"""Seconds between two looks at the status."""
SILENCE_S = 60.0
"""Seconds without a status after which the server counts as ended."""


@click.command(short_help="Replace the code of a running server, without losing a stream.")
@click.option("--path", default="", help="A checkout of the new version, on the server.")
@click.option(
    "--python",
    default="",
    help="An interpreter or a virtual environment with the new version, on the server.  [default: the server's own]",
)
@click.option(
    "--timeout-s",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that the streams of an edge may take to end before they are resumed at the edge that replaces it.",
)
@client_options
@example("moejax upgrade --path ~/moejax-0.3", "moejax upgrade --python /opt/moejax-0.3/bin/python")
def upgrade(client: Client, path: str, python: str, timeout_s: float) -> None:
    """Replace front, edges and ranks of a server by processes that run new code, one after the other, under load.

    The server must have been started with --operate or --chaos, and with edges. Each new process has to answer as the
    one before it did. A version that cannot start, or answers otherwise, is rolled back: the exit status is 1 then.
    """
    path, python = _absolute(path), _absolute(python)
    client.apply("upgrade", timeout_s=timeout_s, path=path, python=python)
    shown, status, answered_at = "", None, time.monotonic()
    while status is None or status.upgrade in ("running", "rolling_back"):
        time.sleep(POLL_S)
        try:
            status = client.status()
        except (Unreachable, DeadlineExceeded) as error:  # the front, or this edge, is being replaced
            if time.monotonic() - answered_at > SILENCE_S:
                raise Unreachable(
                    f"the server has not answered for {SILENCE_S:g} s of the upgrade ({error}). Its log says why."
                ) from None
            continue
        answered_at, text = time.monotonic(), _progress(status)
        if text != shown:
            click.echo(printable(text))
        shown = text
    if status.upgrade != "done":
        sys.exit(1)


def _absolute(path: str) -> str:
    """The absolute form of a path that is there. Raises InvalidRequest for a relative one that is not."""
    if not path or Path(path).is_absolute():
        return path
    if not Path(path).exists():
        raise InvalidRequest(f"{path} is not in {Path.cwd()}. Give the absolute path on the server.", param="path")
    return str(Path(path).absolute())


def _progress(status: Status) -> str:
    if status.upgrade == "done":
        return f"done: all processes run {status.build}"
    if status.upgrade == "rolled_back":
        return f"rolled back, all processes run {status.build}: {status.upgrade_cause}"
    what = "upgrading" if status.upgrade == "running" else "rolling back"
    new = sum(rank.build == status.upgrade_build for rank in status.ranks)
    ranks = f" ({new} of {len(status.ranks)})" if status.upgrade_stage == "ranks" else ""
    return f"{what} to {status.upgrade_build}: {status.upgrade_stage}{ranks}"
