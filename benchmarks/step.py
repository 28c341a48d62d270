"""Measures the parts of a decode step, and the limits that the machine sets.

    python -m benchmarks.step [--model bench-mixtral] [--ranks 1] [--data-type float32] [--concurrency 32] [--json FILE]

First a real server decodes the streams: the time of a step, from scheduling it to having delivered its tokens, consists
of the slowest rank's programs, of the rank around them, and of the front. Then, after the server has ended, the parts
of one rank's programs run alone in this process, with as many rows and threads as that rank had. The table has each
part with its bytes and flops, and the time that these take at the rates measured in the same run: reading memory, and
multiplying matrices (float32, by NumPy). With several ranks, `exchange` is the rest of the programs' time: the exchange
itself and waiting for the other ranks, which share the cores.
"""

import argparse
import asyncio
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads are this module's own

from benchmarks import command
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import make_asks, play
from serving.api.client import AsyncClient
from serving.config import DATA_TYPES, Settings

CONTEXT = 160
WATCHED_S = 6.0


async def serve(address: str, concurrency: int) -> dict[str, float]:
    """Milliseconds of a step of a server that decodes `concurrency` streams: in all, in the slowest rank's programs, in
    receiving and answering on that rank, and in the front."""
    async with AsyncClient(address) as client:
        asks = await make_asks(client, concurrency, 32, CONTEXT * 4)
        streams = [asyncio.create_task(play(client, ask)) for ask in asks]
        while (status := await client.status()).running < concurrency or status.waiting:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)  # the last prompts are through
        before = await client.status()
        await asyncio.sleep(WATCHED_S)
        after = await client.status()
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    steps = after.steps - before.steps
    whole, programs, ranks = (
        (getattr(after, name) - getattr(before, name)) / steps for name in ("step_ms", "program_ms", "rank_ms")
    )
    return {
        "steps": steps,
        "step_ms": whole,
        "programs_ms": programs,
        "rank_overhead_ms": ranks - programs,
        "front_overhead_ms": whole - ranks,
        "tokens_per_s": (after.tokens - before.tokens) / WATCHED_S,
    }


def lines(
    served: dict[str, float], timed: dict[str, dict[str, float]], ranks: int, rates: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    """One row per part of a step: its time, its share of the step, and its limit. `timed` are the parts that were run
    alone (`benchmarks.step_parts.Part`)."""
    total = served["step_ms"]
    timed = dict(timed)
    if ranks > 1:
        timed["exchange"] = {"ms": max(0.0, served["programs_ms"] - sum(row["ms"] for row in timed.values()))}
    for name in ("rank_overhead", "front_overhead"):
        timed[name] = {"ms": served[f"{name}_ms"]}
    for name, row in timed.items():
        bytes_, flops = row.get("bytes", 0.0), row.get("flops", 0.0)
        limit = max(bytes_ / rates[0], flops / rates[1])
        yield {
            "part": name,
            "ms": round(row["ms"], 3),
            "share": round(row["ms"] / total, 4),
            "mb": round(bytes_ / 1e6, 2),
            "gflop": round(flops / 1e9, 4),
            "limit_ms": round(limit, 3),
        }


def main() -> int:
    """Measure, print, and write JSON."""
    options, where = parse(), machine()
    chosen = ("--data-type", options.data_type, "--max-queue", "4096")
    with launched(options.model, options.ranks, options=chosen) as server:
        served = asyncio.run(serve(server.address, options.concurrency))
    threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    os.environ["NPROC"] = str(threads)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    wanted = -(-options.concurrency // options.ranks)
    rows = min(decode for decode, tiles in Settings().buckets if not tiles and decode >= wanted)
    from benchmarks.step_parts import machine_rates, parts  # after the number of threads is set

    found = {name: dataclasses.asdict(part) for name, part in parts(options.model, options.data_type, rows).items()}
    rates = machine_rates()
    table = list(lines(served, found, options.ranks, rates))
    print(f"{options.concurrency} streams, {served['tokens_per_s']:.0f} tokens/s, step {served['step_ms']:.2f} ms")
    print(f"reads {rates[0] / 1e6:.1f} GB/s, multiplies {rates[1] / 1e6:.0f} GFLOP/s on {threads} threads")
    for row in table:
        print(
            f"{row['part']:15} {row['ms']:8.2f} ms {row['share']:7.1%}   limit {row['limit_ms']:7.2f} ms "
            f"({row['mb']:.1f} MB, {row['gflop']:.3f} GFLOP)"
        )
    if options.json is not None:
        result = {
            "machine": where,
            "model": options.model,
            "ranks": options.ranks,
            "data_type": options.data_type,
            "concurrency": options.concurrency,
            "rows_per_rank": rows,
            "gb_per_s": round(rates[0] / 1e6, 2),
            "gflop_per_s": round(rates[1] / 1e6, 1),
            "served": {name: round(value, 3) for name, value in served.items()},
            "parts": table,
        }
        command.write_json(options.json, result)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.step", __doc__)
    parser.add_argument("--model", default="bench-mixtral", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--data-type", choices=DATA_TYPES, default="float32")
    parser.add_argument("--concurrency", type=int, default=32, help="streams that decode at once")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
