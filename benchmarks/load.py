"""Measures a server under overload: open-loop load of up to three times saturation.

    python -m benchmarks.load [--model smollm2-moe|tiny] [--ranks 4] [--server HOST:PORT --http HOST:PORT] [--json FILE]

Saturation is measured first, in a closed loop: requests per second with `--places` requests at a time. Then requests
arrive at random times (Poisson), whether or not earlier ones have ended, at several multiples of saturation. Goodput
is output tokens per second of complete requests; `admitted_ttft_p99_ms` is the time to the first token of requests
that were admitted at the highest load. A refusal with a time to retry (QueueFull) counts as an answer; `lost` counts
requests that got neither their tokens nor a refusal. Meanwhile `--idle` streams are open on which nothing is sent,
and `--slow` clients request long outputs and read one byte a second.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.slow_readers import slow_readers
from benchmarks.streams import Ask, Trace, make_asks, play
from benchmarks.throughput import closed_loop, percentile
from serving.api.client import AsyncClient

REFUSED = "QueueFull"
_DRAIN_LIMIT_S = 120.0
SLOW_TOKENS = 400
"""Tokens of an output for a reader of one byte a second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """The result of one run. Rates are per second of the time in which requests arrived."""

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
        """The result of one run that lasted `seconds`, including the drain."""
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
    """Send requests at `rate` per second for `seconds`, then wait for all of them to end."""
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
    """Keep `count` streams open on which nothing is sent."""

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
    """Measure saturation, then each load; prints a line for each."""
    async with (
        AsyncClient(address) as client,
        idle_streams(client, options.idle),
        slow_readers(options.http, options.slow, SLOW_TOKENS) as read,
    ):
        asks = await make_asks(client, options.places, options.prompt_tokens, options.max_tokens)
        await closed_loop(functools.partial(play, client), asks, options.places, 2 * options.places)  # warm-up
        began = time.monotonic()
        traces = await closed_loop(functools.partial(play, client), asks, options.places, 4 * options.places)
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
    """The figures of all loads. The goodput of the highest load is named after its factor, as in `goodput_at_3x`."""
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
        header = {"machine": machine(), "model": options.model, "ranks": options.ranks}
        command.write_json(options.json, header | result)
    return 1 if result["lost"] else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.load", __doc__)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--server", metavar="HOST:PORT", help="measure this server instead of starting one")
    parser.add_argument("--max-queue", type=int, default=64, help="--max-queue of the server that is started")
    parser.add_argument("--factors", type=multiples, default=(0.5, 1.0, 2.0, 3.0), metavar="0.5,1,2,3")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each load")
    parser.add_argument("--places", type=int, default=32, help="requests at a time while saturation is measured")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="approximate length of a prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--idle", type=int, default=1000, help="open streams on which nothing is sent")
    parser.add_argument("--slow", type=int, default=2, help="readers of one byte a second")
    parser.add_argument("--http", metavar="HOST:PORT", help="HTTP address of --server, for slow readers")
    parser.add_argument("--json", type=Path, help="file for all results")
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
