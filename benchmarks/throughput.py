"""How fast a real server is without failures.

    python -m benchmarks.throughput [--model smollm2-moe|tiny] [--ranks 4] [--tensor 1] [--concurrency 1,8]
        [--json FILE]

Closed loop: so many streams at once, each sending its next request when the last has ended, with a prompt that was not
asked before. Tokens per second are output tokens from the first request to the last token; `ttft_ms` and `itl_ms` are
medians over requests and over gaps between tokens, on the client's clock. `outside_program_share` is the part of a
step, from scheduling it to having delivered its tokens, that the slowest rank did not spend in compiled programs;
`padding_share` is the part of the rows computed on all ranks that were padding, as a step runs in the smallest bucket
that holds it. The server counts both.
"""

import argparse
import asyncio
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import Ask, Trace, make_asks, play
from serving.client import AsyncClient, Client
from serving.config import DATA_TYPES
from serving.status import Status


async def measure(address: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A run for each concurrency; prints a line for each."""
    runs = []
    async with AsyncClient(address) as client:
        count = (1 + arguments.rounds) * sum(arguments.concurrency)
        asks = await make_asks(client, count, arguments.prompt_tokens, arguments.max_tokens)
        fresh = iter(asks)  # none is asked twice: nothing of it is in a cache
        for concurrency in arguments.concurrency:
            warming = list(itertools.islice(fresh, concurrency))  # what depends on the load
            await closed_loop(client, warming, concurrency, len(warming))
            before = await client.status()
            measured = list(itertools.islice(fresh, arguments.rounds * concurrency))
            traces = await closed_loop(client, measured, concurrency, len(measured))
            after = await client.status()
            run = summarize(traces, concurrency) | {
                "outside_program_share": outside_share(before, after),
                "padding_share": padding_share(before, after),
            }
            runs.append(run)
            print("  ".join(f"{name} {value}" for name, value in run.items()), flush=True)
    return runs


async def closed_loop(client: AsyncClient, asks: Sequence[Ask], concurrency: int, requests: int) -> list[Trace]:
    """So many requests, so many at a time."""
    queue: Iterator[Ask] = itertools.islice(itertools.cycle(asks), requests)
    traces: list[Trace] = []

    async def worker() -> None:
        for ask in queue:
            traces.append(await play(client, ask))

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
    """The smallest value that is not below `share` percent of them."""
    return sorted(values)[max(0, -(-len(values) * share // 100) - 1)]


def outside_share(before: Status, after: Status) -> float | None:
    """The part of the time of the steps between two moments that was not spent in compiled programs."""
    steps_ms, programs_ms = after.step_ms - before.step_ms, after.program_ms - before.program_ms
    return round(1 - programs_ms / steps_ms, 4) if steps_ms > 0 else None


def padding_share(before: Status, after: Status) -> float | None:
    """The part of the rows computed between two moments that was padding."""
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
        runs = asyncio.run(measure(server.address, arguments))
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
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=1, help="ranks of a tensor group")
    parser.add_argument("--data-type", choices=DATA_TYPES, default="float32")
    parser.add_argument("--buckets", help="as `moejax serve` takes them; auto after a run that had others")
    parser.add_argument("--concurrency", type=concurrencies, default=(1, 8, 32), metavar="1,8,32")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="about")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


def concurrencies(text: str) -> tuple[int, ...]:
    """Numbers of streams from "1,8,32"."""
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{min(counts)} streams send nothing; give 1 or more")
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
