"""Measures the throughput and latency of a real server without failures.

    python -m benchmarks.throughput [--model smollm2-moe|tiny] [--ranks 4] [--tensor 1] [--concurrency 1,8]
        [--surface grpc,http] [--json FILE]

Each concurrency is measured over gRPC and over HTTP (`/v1/completions`), one after the other. The load is a closed
loop: `--concurrency` streams at once, each of which sends its next request, with another prompt, when the previous one
has ended. Tokens per second are output tokens from the first request to the last token;
`ttft_ms` and `itl_ms` are medians over requests and over gaps between tokens, on the client's clock.
`outside_program_share` is the part of a step, from scheduling it to delivering its tokens, that the slowest rank did
not spend in compiled programs; `padding_share` is the part of the rows on all ranks that were padding, because a step
runs in the smallest bucket that holds it. The server counts both.
"""

import argparse
import asyncio
import functools
import itertools
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.http_streams import http_client, play_http
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import Ask, Trace, make_asks, play
from serving.api.client import AsyncClient, Client
from serving.config import DATA_TYPES
from serving.protocol.status import Status

SURFACES = ("grpc", "http")
Play = Callable[[Ask], Awaitable[Trace]]
"""Sends a request and reads its stream to the end."""


async def measure(address: str, http_address: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each concurrency over each surface; prints a line for each."""
    runs = []
    async with AsyncClient(address) as client, http_client(http_address, max(arguments.concurrency)) as over_http:
        players: dict[str, Play] = {
            "grpc": functools.partial(play, client),
            "http": functools.partial(play_http, over_http),
        }
        count = (1 + arguments.rounds) * sum(arguments.concurrency) * len(arguments.surface)
        asks = await make_asks(client, count, arguments.prompt_tokens, arguments.max_tokens)
        fresh = iter(asks)  # no prompt is sent twice, so that none is in a prefix cache
        for concurrency, surface in itertools.product(arguments.concurrency, arguments.surface):
            warming = list(itertools.islice(fresh, concurrency))
            await closed_loop(players[surface], warming, concurrency, len(warming))
            before = await client.status()
            measured = list(itertools.islice(fresh, arguments.rounds * concurrency))
            traces = await closed_loop(players[surface], measured, concurrency, len(measured))
            after = await client.status()
            run = (
                {"surface": surface}
                | summarize(traces, concurrency)
                | {
                    "outside_program_share": outside_share(before, after),
                    "padding_share": padding_share(before, after),
                }
            )
            runs.append(run)
            print("  ".join(f"{name} {value}" for name, value in run.items()), flush=True)
    return runs


async def closed_loop(play_one: Play, asks: Sequence[Ask], concurrency: int, requests: int) -> list[Trace]:
    """Send `requests` requests, `concurrency` at a time."""
    queue: Iterator[Ask] = itertools.islice(itertools.cycle(asks), requests)
    traces: list[Trace] = []

    async def worker() -> None:
        for ask in queue:
            traces.append(await play_one(ask))

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return traces


def summarize(traces: Sequence[Trace], concurrency: int) -> dict[str, Any]:
    """The figures of one run. Raises RuntimeError when a request failed."""
    failed = next((trace.error for trace in traces if trace.error is not None), None)
    if failed is not None:
        raise RuntimeError(f"a request failed at concurrency {concurrency}: {failed}")
    took = max(trace.times[-1] for trace in traces) - min(trace.sent for trace in traces)
    waits = [1e3 * (trace.times[0] - trace.sent) for trace in traces]
    between = [1e3 * (b - a) for trace in traces for a, b in itertools.pairwise(trace.times)]
    return {
        "concurrency": concurrency,
        "requests": len(traces),
        "output_tokens_per_s": round(sum(len(trace.tokens) for trace in traces) / took, 1),
        "ttft_ms": round(statistics.median(waits), 1),
        "ttft_p95_ms": round(percentile(waits, 95), 1),
        "itl_ms": round(statistics.median(between), 2),
        "itl_p95_ms": round(percentile(between, 95), 2),
    }


def percentile(values: Sequence[float], share: int) -> float:
    """The smallest value that is at least as large as `share` percent of the values."""
    return sorted(values)[max(0, -(-len(values) * share // 100) - 1)]


def outside_share(before: Status, after: Status) -> float | None:
    """The share of step time between two statuses that was not spent in compiled programs."""
    steps_ms, programs_ms = after.step_ms - before.step_ms, after.program_ms - before.program_ms
    return round(1 - programs_ms / steps_ms, 4) if steps_ms > 0 else None


def padding_share(before: Status, after: Status) -> float | None:
    """The share of padding in the rows that were computed between two statuses."""
    rows, filled = after.rows - before.rows, after.rows_filled - before.rows_filled
    return round(1 - filled / rows, 4) if rows > 0 else None


def main() -> int:
    """Measure, print, and write JSON."""
    arguments, where = parse(), machine()
    print(f"starting {arguments.model} on {arguments.ranks} ranks", flush=True)
    options = ["--data-type", arguments.data_type, "--tensor", str(arguments.tensor)]
    if arguments.buckets is not None:
        options += ["--buckets", arguments.buckets]
    with launched(arguments.model, arguments.ranks, options=options) as server, Client(server.address) as client:
        before = client.status()
        runs = asyncio.run(measure(server.address, server.http, arguments))
        after = client.status()
    shares = {"outside_program_share": outside_share(before, after), "padding_share": padding_share(before, after)}
    print("  ".join(f"{name} {value}" for name, value in shares.items()))
    if arguments.json is not None:
        result = {
            "machine": where,
            "model": arguments.model,
            "ranks": arguments.ranks,
            "tensor": arguments.tensor,
            "data_type": arguments.data_type,
            "buckets": after.buckets,
            "prompt_tokens": arguments.prompt_tokens,
            "output_tokens": arguments.max_tokens,
            "runs": runs,
            **shares,
        }
        command.write_json(arguments.json, result)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.throughput", __doc__)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=1, help="ranks of a tensor group")
    parser.add_argument("--data-type", choices=(*DATA_TYPES, "published", "auto"), default="auto")
    parser.add_argument("--buckets", help="--buckets of the server, for example auto after another run")
    parser.add_argument("--concurrency", type=concurrencies, default=(1, 8, 32), metavar="1,8,32")
    parser.add_argument("--surface", type=surfaces, default=SURFACES, metavar="grpc,http")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="approximate length of a prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="number of requests of each stream")
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args()


def concurrencies(text: str) -> tuple[int, ...]:
    """Numbers of streams from "1,8,32"."""
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{min(counts)} streams send nothing; give 1 or more")
    return counts


def surfaces(text: str) -> tuple[str, ...]:
    """Names of surfaces from "grpc,http"."""
    names = tuple(text.split(","))
    if set(names) - set(SURFACES):
        raise argparse.ArgumentTypeError(f"{text} names a surface that is none of {', '.join(SURFACES)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
