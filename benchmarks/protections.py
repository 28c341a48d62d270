"""Measures the cost of fault tolerance while nothing fails: the same server with and without its protections.

    python -m benchmarks.protections [--model smollm2-moe|tiny] [--ranks 4] [--pairs 3] [--rounds 7] [--json FILE]

Two servers run side by side and get requests in turn, in alternating order, so that other work of the machine affects
both alike. One has the default settings, with --kv-replication memory: KV caches are replicated, requests and tokens go
to the journal, weights are scrubbed, a standby front waits. The other has none of this. Heartbeats, epochs and the
read-only cache with its commit are in both; `benchmarks.steady_state` measures their cost. Two servers with the same
settings differ by some percent for as long as they live, so several pairs are started in turn.

Printed are the milliseconds of a step, its median over the rounds, and the median over the ratios of rounds.
"""

import argparse
import asyncio
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import Ask, make_asks, play
from benchmarks.throughput import closed_loop
from serving.api.client import AsyncClient

WITHOUT = ("--kv-replication", "off", "--journal", "off", "--no-supervise", "--scrub-s", "0")
WITH = ("--kv-replication", "memory")


async def measure(addresses: dict[str, str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of a step in each round, by server."""
    took: dict[str, list[float]] = {name: [] for name in addresses}
    clients = {name: AsyncClient(address) for name, address in addresses.items()}
    try:
        first = next(iter(clients.values()))
        asks = await make_asks(first, arguments.streams, arguments.prompt_tokens, arguments.tokens)
        for number in range(arguments.rounds + 1):
            order = sorted(clients, reverse=bool(number % 2))
            for name in order:
                step_ms = await one_round(clients[name], asks)
                if number:  # the first warms up
                    took[name].append(step_ms)
    finally:
        for client in clients.values():
            await client.close()
    return took


async def one_round(client: AsyncClient, asks: Sequence[Ask]) -> float:
    """Send every request once, all at the same time; returns the milliseconds of a step."""
    before = await client.status()
    traces = await closed_loop(functools.partial(play, client), asks, len(asks), len(asks))
    failed = [trace.error for trace in traces if trace.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(traces)} requests failed: {failed[0]}")
    after = await client.status()
    return (after.step_ms - before.step_ms) / (after.steps - before.steps)


def summarize(took: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the cost: how much longer a step is with protections than without, by pairs of rounds."""
    ratios = [a / b for a, b in zip(took["with"], took["without"], strict=True)]
    medians = {f"{name}_ms": round(statistics.median(times), 2) for name, times in took.items()}
    return medians | {
        "cost": round(statistics.median(ratios) - 1, 4),
        "cost_quartiles": [round(q - 1, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
    }


def main() -> int:
    """Measure, print, and write JSON."""
    arguments = parse()
    print(f"starting {arguments.model} on {arguments.ranks} ranks, {arguments.pairs} times two servers", flush=True)
    took: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(arguments.pairs):
        with (
            launched(arguments.model, arguments.ranks, options=WITH if number % 2 else WITHOUT) as first,
            launched(arguments.model, arguments.ranks, options=WITHOUT if number % 2 else WITH) as second,
        ):
            names = ("with", "without") if number % 2 else ("without", "with")
            addresses = dict(zip(names, (first.address, second.address), strict=True))
            pair = asyncio.run(measure(addresses, arguments))
        print(
            "  ".join(f"{name} {statistics.median(times):.2f} ms" for name, times in sorted(pair.items())), flush=True
        )
        for name, times in pair.items():
            took[name] += times
    result = summarize(took)
    low, high = result["cost_quartiles"]
    print(
        f"a step of {arguments.streams} streams: {result['with_ms']:.2f} ms with, "
        f"{result['without_ms']:.2f} ms without; cost {result['cost']:+.1%} (quartiles {low:+.1%}, {high:+.1%})"
    )
    if arguments.json is not None:
        setup = {"machine": machine(), "model": arguments.model, "ranks": arguments.ranks, "streams": arguments.streams}
        command.write_json(arguments.json, setup | result | {"rounds": took})
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.protections", __doc__)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3, help="of servers")
    parser.add_argument("--rounds", type=int, default=7, help="on each server")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="about")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
