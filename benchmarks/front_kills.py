"""Kills the front of a running server again and again under streams of the official OpenAI clients.

    python -m benchmarks.front_kills [--model tiny] [--clients 32] [--minutes 5] [--every-s 10] [--json FILE]

Half of the clients are Python's, half Node's, each with one stream of /v1/completions at a time at temperature 0. Every
prompt is sent once undisturbed; then the clients send them again and again while the front is killed with SIGKILL every
few seconds. A stream is broken when its client raises, and changed when its text is not that of the undisturbed
run: the printed characters are lost, doubled, or other ones. The pause of a kill is the longest time between two pieces
of text, of each stream that was open then; beside it stands the same without a kill, from the seconds between two.
It ends with 1 when a stream broke or changed, or something was compiled.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.compare import Difference, compare
from benchmarks.chaos.streams import Asking, Crowd, Stream, undisturbed
from benchmarks.command import parser, write_json
from benchmarks.launch import ROOT, Launched, launched
from clients.environment import NotInstalled, environment
from clients.tool import Tool
from serving.api.client import AsyncClient

WINDOW_S = 4.0
"""The pause of a kill is the longest within so many seconds after it."""
GRACE_S = 120.0


@dataclasses.dataclass(frozen=True)
class Seen:
    """A stream as its client saw it. Times are seconds since the epoch, one for each piece of text."""

    prompt: str
    text: str
    times: Sequence[float]
    error: str | None

    @classmethod
    def of(cls, stream: Stream) -> "Seen":
        """A stream of the Python client."""
        offset = time.time() - time.monotonic()
        return cls(stream.prompt, stream.text, [at + offset for at in stream.times], stream.error)


def longest_gap(times: Sequence[float], since: float, until: float) -> float | None:
    """The longest time between two pieces of text, in seconds, of the gaps that touch a span; None for a stream that
    has no piece before it or none after its beginning."""
    gaps = [b - a for a, b in itertools.pairwise(times) if b > since and a < until]
    return max(gaps, default=None) if times and times[0] < since < times[-1] else None


def pauses(streams: Sequence[Seen], moments: Sequence[float], window_s: float) -> list[float]:
    """The longest gaps after each moment, of the streams that were open then, in order."""
    found = (longest_gap(each.times, at, at + window_s) for at in moments for each in streams)
    return sorted(gap for gap in found if gap is not None)


def summary(
    streams: Sequence[Seen], wanted: Mapping[str, str], kills: Sequence[float], between: Sequence[float]
) -> dict[str, Any]:
    """The figures of the streams of one kind of client. `between` are moments without a kill."""
    ended = [each for each in streams if each.error is None]
    differences = [compare(each.text, wanted[each.prompt], ended=True) for each in ended]
    total = Difference(*(sum(getattr(each, f.name) for each in differences) for f in dataclasses.fields(Difference)))
    of_kills, without = pauses(streams, kills, WINDOW_S), pauses(streams, between, WINDOW_S)
    return {
        "streams": len(streams),
        "broken": len(streams) - len(ended),
        "differing": sum(not each.none for each in differences),
        "lost_doubled_changed": [total.missing, total.doubled, total.changed],
        "open_at_a_kill": len(of_kills),
        "pause_p50_s": statistics.median(of_kills) if of_kills else None,
        "pause_worst_s": of_kills[-1] if of_kills else None,
        "without_kill_p50_s": statistics.median(without) if without else None,
        "without_kill_worst_s": without[-1] if without else None,
        "errors": sorted({each.error for each in streams if each.error})[:5],
    }


@contextlib.contextmanager
def node(server: Launched, options: argparse.Namespace, prompts: Sequence[str], clients: int) -> Iterator[list[Seen]]:
    """Clients in Node while the block runs; afterwards the list has their streams."""
    seen: list[Seen] = []
    try:
        folder = environment(Tool.of(ROOT / "clients" / "tools" / "openai_node.mjs"))
    except NotInstalled as error:
        print(f"no clients in Node: {error}", flush=True)
        yield seen
        return
    words = [str(folder), server.http, options.model, str(clients), str(options.max_tokens), json.dumps(prompts)]
    command = ["node", str(ROOT / "benchmarks" / "front_kills.mjs"), *words]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, text=True)
        try:
            yield seen
            process.communicate(timeout=GRACE_S)
            output.seek(0)
            seen += (Seen(**json.loads(line)) for line in output)
        finally:
            process.kill()


async def kill_again_and_again(server: Launched, minutes: float, every_s: float) -> tuple[list[float], list[float]]:
    """Kill the front every few seconds. The times of the kills, and times between two of them."""
    end, kills, between = time.monotonic() + 60 * minutes, list[float](), list[float]()
    while time.monotonic() < end:
        await asyncio.sleep(every_s / 2)
        between.append(time.time())
        await asyncio.sleep(every_s / 2)
        pid = await asyncio.to_thread(lambda: server.pid)
        kills.append(time.time())
        os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(every_s / 2)
    return kills, between


async def measure(server: Launched, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the run, by kind of client."""
    url = f"http://{server.http}"
    asking = Asking(options.model, options.max_tokens, {"ignore_eos": True})
    prompts = [f"Scene {number}. Enter the king, and" for number in range(options.prompts)]
    wanted = {each.prompt: each.text for each in await undisturbed(url, asking, prompts, 8)}
    half = options.clients // 2
    with node(server, options, prompts, half) as in_node:
        crowd = Crowd(url, asking, prompts)
        crowd.start(options.clients - half)
        kills, between = await kill_again_and_again(server, options.minutes, options.every_s)
        in_python = [Seen.of(each) for each in await crowd.stop(GRACE_S)]
    async with AsyncClient(server.address) as client:
        status = await client.status()
    return {
        "kills": len(kills),
        "compiles_after_ready": status.compiles_after_ready,
        "python": summary(in_python, wanted, kills, between),
        "node": summary(in_node, wanted, kills, between),
    }


def main() -> int:
    """Measure, and print the figures. Returns the exit status."""
    command = parser("benchmarks.front_kills", __doc__)
    command.add_argument("--model", default="tiny")
    command.add_argument("--ranks", type=int, default=2)
    command.add_argument("--clients", type=int, default=32)
    command.add_argument("--prompts", type=int, default=16)
    command.add_argument("--max-tokens", type=int, default=200)
    command.add_argument("--minutes", type=float, default=5.0)
    command.add_argument("--every-s", type=float, default=10.0)
    command.add_argument("--json", type=Path, help="write the figures to this file")
    options = command.parse_args()
    with launched(options.model, options.ranks) as server:
        result = asyncio.run(measure(server, options))
    print(json.dumps(result, indent=1))
    write_json(options.json, result)
    kinds = (result["python"], result["node"])
    wrong = sum(kind["broken"] + kind["differing"] for kind in kinds) + result["compiles_after_ready"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
