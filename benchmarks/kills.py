"""Kills ranks of a real server at random moments under load, until enough have died, and compares every token.

    python -m benchmarks.kills --kills N [--model tiny|smollm2-moe] [--ranks 4] [--arch collocated|disaggregated|pd]
        [--speculate off|ngram|mtp] [--rebalance] [--streams 6] [--seed 0] [--json FILE]

The tokens of all requests are recorded first from a plain server: collocated, without drafts, undisturbed. Then the
server under test runs them in closed loops, greedy and seeded in turn, while ranks die: one, or sometimes two at once;
by SIGKILL, or sometimes stopped; when all ranks serve, or sometimes before they are back. With arch pd half of the
ranks compute prompts, and losses hit both pools, so that one is sometimes lost whole; one rank of all is left alive.
With --rebalance experts are moved again and again, and ranks die in the middle of that.

Printed every ten kills, and at the end: `lost` requests that ended in an error, `changed` ones with other tokens than
recorded, `compiles` of ranks after they were ready, and which `errors` there were. All must be 0; else it exits
with 1, as where ranks are not back within five minutes. A run that is stopped with SIGINT or SIGTERM reports what it
has so far.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import Known, Load, until, whole
from serving.api.client import AsyncClient
from serving.errors import MoejaxError
from serving.protocol.status import Status

STOPS = 0.15
"""Part of the signals that are SIGSTOP."""
PAIRS = 0.15
"""Part of the losses that hit two ranks at once."""
HURRIES = 0.3
"""Part of the losses that do not wait until all ranks are back."""
LONGEST_WAIT_S = 2.0
"""Seconds up to which a loss waits after all ranks are back; drawn evenly."""
REBALANCE_EVERY_S = 1.0
"""With --rebalance: seconds between two instructions to move experts."""
REPORT_EVERY = 10
"""Kills between two lines of the report."""


@dataclasses.dataclass
class Killer:
    """Kills ranks that serve, and leaves at least one alive."""

    client: AsyncClient
    draw: random.Random
    kills: int = 0
    compiles: int = 0

    async def strike(self) -> None:
        """At a random moment, one rank or two."""
        if self.draw.random() >= HURRIES:
            await until(self.client, whole)
        await asyncio.sleep(self.draw.uniform(0, LONGEST_WAIT_S))
        status = await until(self.client, lambda status: len(serving_ranks(status)) > 1)
        self.compiles = max(self.compiles, status.compiles_after_ready)
        serving = serving_ranks(status)
        count = 2 if self.draw.random() < PAIRS and len(serving) > 2 else 1
        for rank in self.draw.sample(serving, count):
            self.signal(status, rank)

    def signal(self, status: Status, rank: int) -> None:
        """Send SIGKILL, or SIGSTOP in the share STOPS of the kills."""
        pid = status.ranks[rank].pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if self.draw.random() < STOPS else signal.SIGKILL)
                self.kills += 1


def serving_ranks(status: Status) -> list[int]:
    """The ranks that serve, of both pools."""
    return [rank.id for rank in status.ranks if rank.state == "serving"]


@dataclasses.dataclass
class Kills:
    """A run: `known` are the requests with the tokens that they must get."""

    client: AsyncClient
    known: Known
    draw: random.Random
    started: float = dataclasses.field(default_factory=time.monotonic)
    moves: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """How instructions to move experts ended."""

    def __post_init__(self) -> None:
        self.killer = Killer(self.client, self.draw)
        self.load = Load(self.client, self.known.asks)

    async def run(self, kills: int, streams: int, *, rebalance: bool = False) -> dict[str, Any]:
        """Kill so many ranks beside so many streams, wait until all ranks serve and all streams have ended, and return
        the figures."""
        self.load.start(streams)
        moving = asyncio.create_task(self._keep_moving()) if rebalance else None
        try:
            shown = 0
            while self.killer.kills < kills:
                await self.killer.strike()
                if self.killer.kills // REPORT_EVERY > shown:
                    shown = self.killer.kills // REPORT_EVERY
                    print("  ".join(f"{name} {value}" for name, value in self.figures().items()), flush=True)
            status = await until(self.client, whole)
            self.killer.compiles = max(self.killer.compiles, status.compiles_after_ready)
            traces = await self.load.stop()
            figures = self.figures() | {"changed": self.known.changed(traces)}
            return figures | {"drafts_accepted": status.accepted, "requests_sent": status.requests_sent}
        finally:
            if moving is not None:
                moving.cancel()

    def figures(self) -> dict[str, Any]:
        """The figures so far; of every stream the tokens that it has so far are compared."""
        traces = self.load.traces
        so_far = [dataclasses.replace(each, error=each.error or "it may still run") for each in traces]
        figures = {
            "kills": self.killer.kills,
            "seconds": round(time.monotonic() - self.started),
            "requests": len(traces),
            "tokens": sum(len(each.tokens) for each in traces),
            "lost": self.known.failed(traces),
            "changed": self.known.changed(so_far),
            "compiles": self.killer.compiles,
        }
        errors = collections.Counter(each.error for each in traces if each.error is not None)
        figures |= {"errors": dict(errors)} if errors else {}
        return figures | ({"moves": dict(self.moves)} if self.moves else {})

    async def _keep_moving(self) -> None:
        """Have experts moved again and again; where it cannot be done now, the next time is soon."""
        while True:
            try:
                await self.client.apply("rebalance")
                self.moves["done"] += 1
            except MoejaxError as error:
                self.moves[type(error).__name__] += 1
            await asyncio.sleep(self.draw.uniform(0, 2 * REBALANCE_EVERY_S))


async def record(address: str, streams: int, prompt_tokens: int, max_tokens: int) -> Known:
    """The requests, with their tokens on the server at this address."""
    async with AsyncClient(address) as client:
        await until(client, whole)
        return await Known.record(client, 2 * streams, prompt_tokens, max_tokens)


async def kill_ranks(address: str, known: Known, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run against the server at this address."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with AsyncClient(address) as client:
        await until(client, whole)
        run = Kills(client, known, random.Random(arguments.seed))
        try:
            return await run.run(arguments.kills, arguments.streams, rebalance=arguments.rebalance)
        except (asyncio.CancelledError, TimeoutError) as error:
            return run.figures() | {"stopped": str(error) or "by a signal"}


def options_of(arguments: argparse.Namespace) -> list[str]:
    """The flags of `moejax serve` for the server under test."""
    half = arguments.ranks // 2
    sides = {
        "collocated": [],
        "disaggregated": ["--attention", str(half), "--experts", str(arguments.ranks - half)],
        "pd": ["--prefill", str(half), "--decode", str(arguments.ranks - half)],
    }
    # By itself a small model would not draft for many streams; with a number of drafts it does in every step.
    drafts = ["--draft-tokens", "2"] if arguments.speculate == "mtp" else []
    return ["--arch", arguments.arch, *sides[arguments.arch], "--speculate", arguments.speculate, *drafts]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.kills", __doc__)
    parser.add_argument("--kills", type=int, required=True, help="how many ranks die")
    parser.add_argument("--model", default="tiny", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--arch", choices=("collocated", "disaggregated", "pd"), default="collocated")
    parser.add_argument("--speculate", choices=("off", "ngram", "mtp"), default="off")
    parser.add_argument("--rebalance", action="store_true", help="move experts all the time")
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=100, help="about")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error(f"--ranks is {arguments.ranks}, and one rank is left alive; give at least 2")
    return arguments


def main() -> int:
    """Run, print, and write JSON. Returns 1 if a request was lost, a token changed or a rank compiled after it was
    ready."""
    arguments = parse()
    print(f"recording {2 * arguments.streams} requests on a plain server of {arguments.model}", flush=True)
    with launched(arguments.model, min(2, arguments.ranks)) as server:
        known = asyncio.run(record(server.address, arguments.streams, arguments.prompt_tokens, arguments.max_tokens))
    options = options_of(arguments)
    print(f"moejax serve --model {arguments.model} --ranks {arguments.ranks} {' '.join(options)}", flush=True)
    with launched(arguments.model, arguments.ranks, options=options) as server:
        figures = asyncio.run(kill_ranks(server.address, known, arguments))
    print("  ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    command.write_json(arguments.json, {"machine": machine(), "settings": settings, **figures})
    return int(any(figures.get(name) for name in ("lost", "changed", "compiles", "stopped")))


if __name__ == "__main__":
    raise SystemExit(main())
