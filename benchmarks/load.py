"""What a server does with more than it can: open-loop load up to three times saturation.

    python -m benchmarks.load [--model smollm2-moe|tiny] [--ranks 4] [--server HOST:PORT --http HOST:PORT] [--json FILE]

Saturation is measured first, closed loop: requests per second with all places taken. Then requests arrive at random
times (Poisson), whether or not earlier ones are done, at several multiples of it. Goodput is output tokens per second
of requests that were answered whole; `admitted_ttft_p99_ms` is that of requests that were let in, at the highest
load. A refusal with a time to come back (QueueFull) is an answer; `lost` counts requests that got neither their
tokens nor one. All the while `--idle` streams are open that have nothing to say, and `--slow` clients ask for long
answers and read one byte a second.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.slow_readers import slow_readers
from benchmarks.streams import Ask, Trace, make_asks, play
from benchmarks.throughput import closed_loop, percentile
from serving.client import AsyncClient

REFUSED = "QueueFull"
_DRAIN_LIMIT_S = 120.0
SLOW_TOKENS = 400
"""Of an answer to a reader of one byte a second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What became of the requests of one run. Rates are per second of the time in which requests arrived."""

    factor: float
    offered: float
    sent: int
    whole: int
    refused: int
    lost: int
    goodput: float
    admitted_ttft_p99_ms: float | None

    @classmethod
    def of(cls, traces: Sequence[Trace], factor: float, offered: float, seconds: float) -> "Load":
        """The account of one run that lasted `seconds`, the drain included."""
        whole = [trace for trace in traces if trace.error is None and len(trace.tokens) == trace.ask.max_tokens]
        refused = [trace for trace in traces if (trace.error or "").startswith(REFUSED)]
        waits = [1e3 * (trace.times[0] - trace.sent) for trace in whole]
        return cls(
            factor=factor,
            offered=round(offered, 2),
            sent=len(traces),
            whole=len(whole),
            refused=len(refused),
            lost=len(traces) - len(whole) - len(refused),
            goodput=round(sum(len(trace.tokens) for trace in whole) / seconds, 1),
            admitted_ttft_p99_ms=round(percentile(waits, 99), 1) if waits else None,
        )


async def open_loop(client: AsyncClient, asks: Sequence[Ask], rate: float, seconds: float, seed: int) -> list[Trace]:
    """Send requests at `rate` per second for `seconds`, then wait for what was let in."""
    draw, tasks = random.Random(seed), []
    due, end = time.monotonic(), time.monotonic() + seconds
    for ask in itertools.cycle(asks):
        due += draw.expovariate(rate)
        if due > end:
            break
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(play(client, ask)))
    async with asyncio.timeout(_DRAIN_LIMIT_S):
        return await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def idle_streams(client: AsyncClient, count: int) -> AsyncIterator[None]:
    """So many open streams on which nothing comes for now."""

    async def listen() -> None:
        async for _ in client.watch(after=2**60):
            pass

    tasks = [asyncio.create_task(listen()) for _ in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(address: str, options: argparse.Namespace) -> dict[str, Any]:
    """Saturation, then each load; prints a line for each."""
    async with (
        AsyncClient(address) as client,
        idle_streams(client, options.idle),
        slow_readers(options.http, options.slow, SLOW_TOKENS) as read,
    ):
        asks = await make_asks(client, options.places, options.prompt_tokens, options.max_tokens)
        await closed_loop(client, asks, options.places, 2 * options.places)  # warms up what depends on the load
        began = time.monotonic()
        traces = await closed_loop(client, asks, options.places, 4 * options.places)
        saturation = len(traces) / (time.monotonic() - began)
        print(f"saturation {saturation:.2f} requests per second, {options.places} at a time", flush=True)
        loads = []
        for seed, factor in enumerate(options.factors):
            began, rate = time.monotonic(), factor * saturation
            traces = await open_loop(client, asks, rate, options.seconds, seed)
            loads.append(Load.of(traces, factor, rate, time.monotonic() - began))
            print("  ".join(f"{name} {value}" for name, value in dataclasses.asdict(loads[-1]).items()), flush=True)
        crowd = {"idle_streams": options.idle, "slow_readers": options.slow, "slow_bytes": sum(read)}
    return {"saturation": round(saturation, 2)} | verdict(loads) | crowd


def verdict(loads: Sequence[Load]) -> dict[str, Any]:
    """The figures of all loads; that of the highest is `goodput_at_3x` when it was three times saturation."""
    most = max(loads, key=lambda load: load.factor)
    return {
        "peak_goodput": max(load.goodput for load in loads),
        f"goodput_at_{most.factor:g}x": most.goodput,
        "admitted_ttft_p99_ms": most.admitted_ttft_p99_ms,
        "lost": sum(load.lost for load in loads),
        "loads": [dataclasses.asdict(load) for load in loads],
    }


def main() -> int:
    """Measure, print, and write JSON. Exit status 1 when a request was lost."""
    options = parse()
    if options.server is not None:
        result = asyncio.run(measure(options.server, options))
    else:
        print(f"starting {options.model} on {options.ranks} ranks", flush=True)
        with launched(options.model, options.ranks, options=["--max-queue", str(options.max_queue)]) as server:
            options.http = server.http
            result = asyncio.run(measure(server.address, options))
    print("  ".join(f"{name} {value}" for name, value in result.items() if name != "loads"))
    if options.json is not None:
        told = {"machine": machine(), "model": options.model, "ranks": options.ranks}
        options.json.write_text(json.dumps(told | result, indent=1) + "\n")
    return 1 if result["lost"] else 0


def parse() -> argparse.Namespace:
    """The command line."""
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--server", metavar="HOST:PORT", help="measure this server instead of starting one")
    parser.add_argument("--max-queue", type=int, default=64, help="of the server that is started")
    parser.add_argument("--factors", type=multiples, default=(0.5, 1.0, 2.0, 3.0), metavar="0.5,1,2,3")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--places", type=int, default=32, help="requests at a time when saturation is measured")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="about")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--idle", type=int, default=1000, help="streams that are open and silent")
    parser.add_argument("--slow", type=int, default=2, help="readers of one byte a second")
    parser.add_argument("--http", metavar="HOST:PORT", help="where --server speaks HTTP, for slow readers")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    if options.server is not None and options.slow and options.http is None:
        parser.error("--server needs --http HOST:PORT for slow readers, or --slow 0")
    return options


def multiples(text: str) -> tuple[float, ...]:
    """Multiples of saturation from "0.5,1,3"."""
    factors = tuple(float(part) for part in text.split(","))
    if min(factors) <= 0:
        raise argparse.ArgumentTypeError(f"{min(factors)} times saturation sends nothing; give more than 0")
    return factors


if __name__ == "__main__":
    raise SystemExit(main())
