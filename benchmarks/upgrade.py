"""Upgrades a running server under load, again and again, to a copy of this checkout and back.

Streams run all the time, half of them over HTTP as any client of OpenAI's API reads them. For each upgrade the program
prints how long it took, the streams that failed, the ones with a token that an undisturbed server does not give (over
HTTP: with another number of tokens), and the longest pause between two tokens of a stream, its median over streams and
its worst. It ends with 1 when a stream failed or changed, or something was compiled.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import parser, write_json
from benchmarks.http_streams import http_client, play_http
from benchmarks.launch import ROOT, Launched
from benchmarks.streams import Ask, Trace, play
from serving.api.client import AsyncClient
from serving.errors import MoejaxError
from tests.support.checkouts import copy_checkout

POLL_S = 0.2


def asks(options: argparse.Namespace) -> list[Ask]:
    """The requests of the load, alternately greedy and seeded."""
    texts = [f"Once upon a time there were {number} kings, and" for number in range(options.streams)]
    return [Ask(text, float(number % 2), number, options.tokens) for number, text in enumerate(texts)]


async def run_until(stopped: asyncio.Event, ask: Ask, server: Launched, found: list[Trace], *, plain: bool) -> None:
    """Send a request again and again, over HTTP if `plain`."""
    async with AsyncClient(server.address) as client, http_client(server.http, 1) as web:
        while not stopped.is_set():
            found.append(await (play_http(web, ask) if plain else play(client, ask)))


async def upgrade(address: str, path: Path, drain_s: float) -> tuple[str, int]:
    """Upgrade a server and wait for the end. Returns how it ended, and the compiles since the front is ready."""
    async with AsyncClient(address) as client:
        await client.apply("upgrade", path=str(path), timeout_s=drain_s)
        while True:
            await asyncio.sleep(POLL_S)
            with contextlib.suppress(MoejaxError):  # the front, or the edge of this client, is being replaced
                status = await client.status()
                if status.upgrade not in ("running", "rolling_back"):
                    return status.upgrade, status.compiles_after_ready


async def upgrade_under_load(
    server: Launched, known: Sequence[Trace], path: Path, options: argparse.Namespace
) -> tuple[str, int, float, list[Trace]]:
    """One upgrade: how it ended, compiles, seconds, and the streams that ran meanwhile."""
    stopped, found = asyncio.Event(), list[Trace]()
    async with asyncio.TaskGroup() as group:
        for number, trace in enumerate(known):
            plain = number % 2 == 0
            group.create_task(run_until(stopped, trace.ask, server, found, plain=plain))
        await asyncio.sleep(1.0)
        began = time.monotonic()
        outcome, compiles = await upgrade(server.address, path, options.drain_s)
        took = time.monotonic() - began
        stopped.set()
    return outcome, compiles, took, found


async def record(server: Launched, options: argparse.Namespace) -> list[Trace]:
    """The answers of the undisturbed server, as each kind of client reads them."""
    async with AsyncClient(server.address) as client, http_client(server.http, options.streams) as web:
        return [
            await (play_http(web, ask) if number % 2 == 0 else play(client, ask))
            for number, ask in enumerate(asks(options))
        ]


def longest_pauses(traces: Sequence[Trace]) -> list[float]:
    """The longest time between two tokens of each stream, in milliseconds."""
    gaps = ([after - before for before, after in zip(each.times, each.times[1:], strict=False)] for each in traces)
    return [1e3 * max(each) for each in gaps if each]


def main() -> int:
    """Make the upgrades and print a line for each. Returns the exit status."""
    command = parser("benchmarks.upgrade", __doc__)
    command.add_argument("--model", default="tiny")
    command.add_argument("--ranks", type=int, default=2)
    command.add_argument("--edges", type=int, default=2)
    command.add_argument("--streams", type=int, default=16)
    command.add_argument("--tokens", type=int, default=100, help="tokens of each stream")
    command.add_argument("--upgrades", type=int, default=20, help="there and back, in turn")
    command.add_argument("--drain-s", type=float, default=30.0, help="seconds that streams of an edge may take to end")
    command.add_argument("--json", type=Path)
    options = command.parse_args()
    wrong, results = 0, []
    with tempfile.TemporaryDirectory(prefix="moejax-upgrade-") as folder:
        copy = copy_checkout(Path(folder) / "new")
        server = Launched(options.model, options.ranks, options=("--edges", str(options.edges)))
        try:
            known = asyncio.run(record(server, options))
            tokens = {each.ask: each.tokens for each in known}
            print("upgrade | ended | seconds | streams | failed | changed | compiles | pause, ms: median, worst")
            for number in range(options.upgrades):
                path = copy if number % 2 == 0 else ROOT
                outcome, compiles, took, found = asyncio.run(upgrade_under_load(server, known, path, options))
                failed = [each.error for each in found if each.error]
                changed = sum(each.tokens != tokens[each.ask] for each in found if not each.error)
                pauses = longest_pauses(found)
                print(
                    f"{number + 1} | {outcome} | {took:.1f} | {len(found)} | {len(failed)} | {changed} | {compiles} | "
                    f"{statistics.median(pauses):.0f}, {max(pauses):.0f}",
                    flush=True,
                )
                for error in failed[:3]:
                    print(f"  {error}")
                wrong += len(failed) + changed + compiles + (outcome != "done")
                results.append({"seconds": took, "streams": len(found), "failed": len(failed), "changed": changed})
        finally:
            server.stop()
    write_json(options.json, results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
