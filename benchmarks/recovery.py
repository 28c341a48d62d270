"""Measures the cost of the loss of a rank for the streams of a real server.

    python -m benchmarks.recovery [--ranks 4] [--model smollm2-moe|tiny] [--kills N] [--kv-replication auto|off]
        [--cold] [--json FILE]

Starts `moejax serve`, keeps streams running from a client (greedy and seeded in turn, each request's tokens
known from an undisturbed run), and sends SIGKILL, every fourth time SIGSTOP, to the process of one rank
after the other. The server replaces each; the next dies when all serve again and every single loss is
prepared. `kept` and `again` are cache entries of moved streams: restored from a KV replica, and computed again.

Added stall: the longest gap of a stream that overlaps with [kill, first step after the recovery], detection included,
less the stream's median gap in the undisturbed time before, all on the client's clock. Survivors are streams that ran
on other ranks, moved streams ran on the victim. `warm_restart_s` is the time from starting the same server again, with
its executables and model cached, to the first token of a request; the end of the old server is not part of it. `ratio`
is that time over the median stall of all streams at SIGKILL. `cold_start_s` is the same time without cached
executables.
"""

import argparse
import asyncio
import dataclasses
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.launch import cold_cache, launched
from benchmarks.losses import EventFeed, LossRecord, kill_order, lose_rank, middle
from benchmarks.machine import machine
from benchmarks.stalls import Spread
from benchmarks.streams import Known, until, whole
from serving.api.client import AsyncClient
from serving.config import KV_REPLICATION

_OPTIONS = ("--no-prefix-caching",)
"""The same prompts are sent again and again; moved streams must not find them cached."""
_COLUMNS = (
    f"{'victim':>6} {'signal':8} {'detect':>7} {'adopt':>7} {'survivors':>15} {'moved':>15} {'rejoin':>7} "
    f"{'whole':>7} {'gap':>6} {'ctx':>4} {'kept':>5} {'again':>5} "
    f"{'compiles':>8} {'req.':>4} {'failed':>6} {'changed':>7}"
)


async def measure(address: str, arguments: argparse.Namespace) -> list[LossRecord]:
    """All losses, one after the other; prints a line for each."""
    draw = random.Random(arguments.seed)
    async with AsyncClient(address) as client:
        await until(client, whole)
        streams = arguments.streams or 2 * arguments.ranks
        print(f"recording {streams} requests undisturbed", flush=True)
        known = await Known.record(client, streams, arguments.prompt_tokens, arguments.max_tokens)
        feed = EventFeed(client)
        records = []
        print(f"milliseconds, median / max; whole in seconds\n{_COLUMNS}", flush=True)
        try:
            for victim, how in kill_order(arguments.kills or 2 * arguments.ranks, arguments.ranks):
                record = await lose_rank(client, feed, known, victim, how, context=arguments.context, draw=draw)
                records.append(record)
                print(line(record), flush=True)
        finally:
            feed.close()
    return records


def line(record: LossRecord) -> str:
    """A row of the table."""
    r = record
    pause = "-" if r.rejoin_pause_ms is None else f"{r.rejoin_pause_ms:.0f}"
    gap = "-" if r.gap_ms is None else f"{r.gap_ms:.1f}"
    return (
        f"{r.victim:6} {r.signal:8} {r.detect_ms:7.1f} {r.adopt_ms:7.1f} {shown(r.survivor_stall_ms):>15} "
        f"{shown(r.moved_stall_ms):>15} {pause:>7} {r.whole_after_s:7.1f} {gap:>6} {r.context_tokens:4} "
        f"{r.tokens_restored:5} {r.tokens_recomputed:5} {r.compiles_between:8} {r.requests:4} {r.failed:6} "
        f"{r.tokens_changed:7}"
    )


def shown(spread: Spread) -> str:
    """Median / max."""
    return "-" if spread.median is None else f"{spread.median:.0f} / {spread.max:.0f}"


def summarize(records: Sequence[LossRecord], warm_restart_s: float, cold_start_s: float | None) -> dict[str, Any]:
    """The figures of all losses: survivors, moved and ratio are of SIGKILL; medians are over all streams."""
    kills = [r for r in records if r.signal == "SIGKILL"]
    hangs = [r for r in records if r.signal == "SIGSTOP"]
    survivors = Spread.of(stall for r in kills for stall in r.stalls["survivors"])
    moved = Spread.of(stall for r in kills for stall in r.stalls["moved"])
    both = Spread.of(stall for r in kills for stalls in r.stalls.values() for stall in stalls).median
    return {
        "requests": sum(r.requests for r in records),
        "failed": sum(r.failed for r in records),
        "tokens_changed": sum(r.tokens_changed for r in records),
        "compiles_between": sum(r.compiles_between for r in records),
        "tokens_restored": sum(r.tokens_restored for r in records),
        "tokens_recomputed": sum(r.tokens_recomputed for r in records),
        "detect_ms": middle(r.detect_ms for r in kills),
        "hang_detect_ms": middle(r.detect_ms for r in hangs),
        "adopt_ms": middle(r.adopt_ms for r in records),
        "survivor_stall_ms": dataclasses.asdict(survivors),
        "moved_stall_ms": dataclasses.asdict(moved),
        "hang_stall_ms": dataclasses.asdict(
            Spread.of(stall for r in hangs for stalls in r.stalls.values() for stall in stalls)
        ),
        "stall_ms": both,
        "rejoin_pause_ms": middle(r.rejoin_pause_ms for r in records),
        "rejoin_pause_max_ms": Spread.of(r.rejoin_pause_ms for r in records if r.rejoin_pause_ms is not None).max,
        "gap_ms": middle(r.gap_ms for r in records),
        "context_tokens": round(statistics.mean(r.context_tokens for r in records)),
        "cold_start_s": None if cold_start_s is None else round(cold_start_s, 2),
        "warm_restart_s": round(warm_restart_s, 2),
        "ratio": round(1e3 * warm_restart_s / both, 1) if both else None,
    }


def first_token_s(model: str, ranks: int, *, cold: bool = False, options: Sequence[str] = ()) -> float:
    """From starting a server to the first token of a request; the server is stopped then."""
    if cold:
        with cold_cache() as cache, launched(model, ranks, cache=cache, options=options) as server:
            return server.first_token_s
    with launched(model, ranks, options=options) as server:
        return server.first_token_s


def main() -> int:
    """Measure, print, and write JSON. The exit status is 1 when a request failed or a token changed."""
    arguments = parse()
    where = machine()
    cold_start_s = None
    if arguments.cold:
        print("starting without compiled programs", flush=True)
        cold_start_s = first_token_s(arguments.model, arguments.ranks, cold=True)
    print(f"starting {arguments.model} on {arguments.ranks} ranks", flush=True)
    options = (*_OPTIONS, "--kv-replication", arguments.kv_replication)
    with launched(arguments.model, arguments.ranks, options=options) as server:
        records = asyncio.run(measure(server.address, arguments))
    print("restarting the server", flush=True)
    warm_restart_s = first_token_s(arguments.model, arguments.ranks)
    summary = summarize(records, warm_restart_s, cold_start_s)
    for name, value in summary.items():
        print(f"{name:>20}  {value}")
    if arguments.json is not None:
        result = {
            "machine": where,
            "model": arguments.model,
            "ranks": arguments.ranks,
            "kv_replication": arguments.kv_replication,
            "kills": [dataclasses.asdict(record) for record in records],
            "summary": summary,
        }
        command.write_json(arguments.json, result)
    return 1 if summary["failed"] or summary["tokens_changed"] else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.recovery", __doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--kills", type=int, help="default: each rank twice")
    parser.add_argument("--streams", type=int, help="at once; default: two for each rank")
    parser.add_argument("--prompt-tokens", type=int, default=190, help="about")
    parser.add_argument("--max-tokens", type=int, default=130)
    parser.add_argument("--context", type=int, default=256, help="mean context of the streams at the kill")
    parser.add_argument("--kv-replication", default="auto", choices=KV_REPLICATION, help="as of the server")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--cold", action="store_true", help="also start once with no executables cached")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks is 1, and streams of a rank without others have nowhere to go; give at least 2")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
