"""Counts false alarms of a real server on a machine that is short of processors, and times the true ones.

    python -m benchmarks.alarms [--model smollm2-moe|tiny] [--ranks 4] [--minutes 10] [--busy 8] [--rounds 1]
        [--starved-factor 2.0] [--json FILE]

Starts `moejax serve`, keeps streams running whose tokens are known from an undisturbed run, and measures with the
machine to itself how long it takes from a fault of a rank to the server's `rank_lost` event: SIGKILL, SIGSTOP, and a
program that is stuck (ptrace holds the main thread; heartbeats go on as far as they can). Then `--busy` processes that
do nothing but run, at the same priority, take the processors. For `--minutes` the streams go on while one rank after
the other is killed and replaced: each further loss of a rank is a false alarm. Then the three faults are timed again.

`starved` counts events by which the server says that a rank was late and was given longer; `--starved-factor 1` gives
it no longer. The exit status is 1 after a false alarm, a lost stream, or a changed token.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import launched
from benchmarks.losses import EventFeed, local
from benchmarks.machine import machine
from benchmarks.streams import Known, Load, until, whole
from benchmarks.stuck import StuckProgram
from serving.api.client import AsyncClient
from serving.protocol.events import Event

FAULTS = ("SIGKILL", "SIGSTOP", "stuck")
_WHOLE_S = 900.0
"""Most seconds that a rank takes to be replaced."""
_STEADY_S = 3.0
"""Seconds of steps between a replacement and the next fault."""


@dataclasses.dataclass(frozen=True)
class Detection:
    """A fault that was found: `seconds` after it happened, with the cause that the server gave."""

    fault: str
    busy: int
    rank: int
    seconds: float
    cause: str


@dataclasses.dataclass
class Bench:
    """A running server under load, and what was done to it. `expected` are the losses of ranks that it must report."""

    client: AsyncClient
    feed: EventFeed
    ranks: int
    expected: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    found: list[Detection] = dataclasses.field(default_factory=list)
    turn: int = 0

    async def detect(self, fault: str, busy: int) -> None:
        """Do something to the next rank, and wait until the server has found it and is whole again."""
        rank = self.turn % self.ranks
        self.turn += 1
        pid = (await self.client.status()).ranks[rank].pid
        assert pid is not None, f"rank {rank} has no process"
        moment = time.monotonic()
        stuck = None
        if fault == "stuck":
            stuck = StuckProgram(pid)
        else:
            os.kill(pid, getattr(signal, fault))
        self.expected.append((rank, moment))
        lost = await self.feed.wait("rank_lost", moment, rank)
        self.found.append(Detection(fault, busy, rank, round(local(lost) - moment, 3), lost.cause))
        print(f"{fault:8} {busy:4} busy, rank {rank}: {local(lost) - moment:7.3f} s  {lost.cause}", flush=True)
        if stuck is not None:
            stuck.release()
        await until(self.client, whole, limit_s=_WHOLE_S)
        await asyncio.sleep(_STEADY_S)

    async def replace_ranks(self, seconds: float, busy: int) -> int:
        """Kill one rank after the other for a while, each when the one before was replaced. Returns how many."""
        end, kills = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            await self.detect("SIGKILL", busy)
            kills += 1
        return kills

    def false_alarms(self) -> list[Event]:
        """The losses that nothing here has caused."""
        left = list(self.expected)
        alarms = []
        for event in self.feed.all("rank_lost"):
            caused = next((each for each in left if each[0] == event.rank and each[1] <= local(event) + 0.01), None)
            if caused is None:
                alarms.append(event)
            else:
                left.remove(caused)
        return alarms


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that run without end, at the priority of this one."""
    started = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


async def measure(address: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it on a running server."""
    async with AsyncClient(address) as client:
        await until(client, whole)
        known = await Known.record(client, arguments.streams, arguments.prompt_tokens, arguments.max_tokens)
        feed = EventFeed(client)
        bench = Bench(client, feed, arguments.ranks)
        load = Load(client, known.asks)
        load.start(arguments.streams)
        try:
            for fault in FAULTS * arguments.rounds:
                await bench.detect(fault, 0)
            with busy_processes(arguments.busy):
                began = time.monotonic()
                kills = await bench.replace_ranks(60 * arguments.minutes, arguments.busy)
                loaded_s = time.monotonic() - began
                for fault in FAULTS * arguments.rounds:
                    await bench.detect(fault, arguments.busy)
            traces = await load.stop()
        finally:
            feed.close()
        alarms = bench.false_alarms()
        return {
            "minutes_loaded": round(loaded_s / 60, 1),
            "ranks_replaced": kills,
            "false_alarms": [f"rank {event.rank} {event.cause}" for event in alarms],
            "starved": [f"rank {event.rank} {event.cause}" for event in feed.all("starved")],
            "detections": [dataclasses.asdict(each) for each in bench.found],
            "requests": len(traces),
            "failed": known.failed(traces),
            "tokens_changed": known.changed(traces),
        }


def table(detections: Sequence[dict[str, Any]], busy: int) -> list[str]:
    """Rows of the times of each fault, median and most, idle and loaded."""
    rows = [f"{'fault':8} {'idle':>15} {f'{busy} busy':>15}   seconds, median / most"]
    for fault in FAULTS:
        cells = []
        for with_busy in (0, busy):
            seconds = sorted(d["seconds"] for d in detections if (d["fault"], d["busy"]) == (fault, with_busy))
            cells.append(f"{seconds[len(seconds) // 2]:.3f} / {seconds[-1]:.3f}" if seconds else "-")
        rows.append(f"{fault:8} {cells[0]:>15} {cells[1]:>15}")
    return rows


def main() -> int:
    """Measure, print, and write JSON."""
    arguments = parse()
    where = machine()
    options = ("--no-prefix-caching", "--starved-factor", str(arguments.starved_factor))
    print(f"starting {arguments.model} on {arguments.ranks} ranks", flush=True)
    with launched(arguments.model, arguments.ranks, options=options) as server:
        result = asyncio.run(measure(server.address, arguments))
    print("\n".join(table(result["detections"], arguments.busy)))
    for name in ("minutes_loaded", "ranks_replaced", "requests", "failed", "tokens_changed"):
        print(f"{name:>15}  {result[name]}")
    for name in ("starved", "false_alarms"):
        print(f"{name:>15}  {len(result[name])}")
        for cause in result[name]:
            print(f"{'':>15}  {cause}")
    if arguments.json is not None:
        given = {"machine": where, "model": arguments.model, "ranks": arguments.ranks, "busy": arguments.busy}
        arguments.json.write_text(json.dumps(given | result, indent=1) + "\n")
    return 1 if result["false_alarms"] or result["failed"] or result["tokens_changed"] else 0


def parse() -> argparse.Namespace:
    """The command line."""
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alarms",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="under the load of the busy processes")
    parser.add_argument("--busy", type=int, default=8, help="processes that do nothing but run")
    parser.add_argument("--rounds", type=int, default=1, help="of each fault, idle and loaded")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=100, help="about")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--starved-factor", type=float, default=2.0, help="as of the server")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
