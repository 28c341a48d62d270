"""The balance of experts under a skewed load: `python -m benchmarks.rebalance [--topics one|zipf]`.

Streams run without a pause, all on one topic, or each answer on a topic that is drawn: the k-th of them with a weight
of 1 / k^1.2 (Zipf). The share of the hottest rank and the tokens per second are measured before,
while and after `moejax apply rebalance` moves experts, and the longest time between two tokens of a stream while they
move.
"""

import asyncio
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import parser, write_json
from benchmarks.launch import launched
from benchmarks.streams import Ask, Trace, play, until, whole
from serving.api.client import AsyncClient
from serving.errors import DeadlineExceeded

TOPICS = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n",
    "The treaty was signed in 1648, and ended a war of thirty years. The princes of the empire ",
    "Boil the water with some salt, add the rice, and stir until it is soft. Then chop the onion and ",
    "Let x be a real number with x > 0. Then the integral of 1 / x from 1 to x equals ",
    "Il etait une fois une petite fille qui vivait dans une maison au bord de la foret. Un jour, ",
    "The heart has four chambers. Blood from the veins enters the right atrium, flows through ",
    "SELECT name, count(*) FROM orders JOIN customers ON orders.customer = customers.id WHERE ",
    "Dear Sir or Madam, thank you for your letter of the third of May. We regret that ",
)
ZIPF = 1.2


def prompts(topics: str, seed: int) -> Iterator[str]:
    """The prompts of a stream, one for each answer."""
    shares = [1.0] if topics == "one" else [1 / rank**ZIPF for rank in range(1, len(TOPICS) + 1)]
    draws = random.Random(seed)
    while True:
        yield from draws.choices(TOPICS[: len(shares)], shares)


async def rebalanced(client: AsyncClient) -> list[str]:
    """The messages of all events of experts that moved, or need not."""
    found = []
    try:
        async for event in client.watch(0, timeout_s=1.0):
            if event.kind == "rebalanced":
                found.append(event.message)
    except DeadlineExceeded:
        pass
    return found


def rate(traces: Sequence[Trace], begin: float, end: float) -> float:
    """Tokens per second of all streams in a time."""
    return sum(begin <= at < end for trace in traces for at in trace.times) / (end - begin)


def longest_gap_ms(traces: Sequence[Trace], begin: float, end: float) -> float:
    """The longest time between two tokens of a stream that ends in a time."""
    gaps = (
        1e3 * (later - earlier)
        for trace in traces
        for earlier, later in zip(trace.times, trace.times[1:], strict=False)
        if begin <= later < end
    )
    return max(gaps, default=0.0)


async def measure(address: str, streams: int, seconds: float, topics: str) -> dict[str, Any]:
    """Run the load, have experts moved in the middle, and measure both halves."""
    async with AsyncClient(address) as client:
        await until(client, whole)
        going, traces = True, list[Trace]()

        async def run(number: int) -> None:
            for turn, prompt in enumerate(prompts(topics, number)):
                if not going:
                    return
                ask = Ask(prompt, 0.8, 1000 * number + turn, 64)
                trace = Trace(ask, time.monotonic())
                traces.append(trace)
                await play(client, ask, trace)

        tasks = [asyncio.create_task(run(number)) for number in range(streams)]
        await asyncio.sleep(2.0)  # until all streams decode
        begin = time.monotonic()
        await asyncio.sleep(seconds)
        asked = time.monotonic()
        await client.apply("rebalance")
        moved = time.monotonic()
        await asyncio.sleep(seconds)
        end = time.monotonic()
        message = (await rebalanced(client))[-1]
        await client.apply("rebalance")  # what the same load makes of the new placement
        second = (await rebalanced(client))[-1]
        going = False
        await asyncio.gather(*tasks)
        status = await client.status()
    shares = [float(share) for share in re.findall(r"\d+\.\d+", message)]
    usual = [1e3 * (b - a) for t in traces for a, b in zip(t.times, t.times[1:], strict=False) if begin <= b < asked]
    return {
        "streams": streams,
        "message": message,
        "hottest share before": shares[-1],
        "hottest share predicted": shares[0],
        "hottest share measured after": float(re.findall(r"\d+\.\d+", second)[-1]),
        "tokens/s before": round(rate(traces, begin, asked), 1),
        "tokens/s while experts move": round(rate(traces, asked, moved), 1),
        "tokens/s after": round(rate(traces, moved, end), 1),
        "move, ms": round(1e3 * (moved - asked)),
        "usual gap, ms": round(statistics.median(usual), 1),
        "longest gap before, ms": round(longest_gap_ms(traces, begin, asked), 1),
        "longest gap while experts move, ms": round(longest_gap_ms(traces, asked, moved + 0.1), 1),
        "failed": sum(trace.error is not None for trace in traces),
        "compiles": status.compiles_after_ready,
    }


def main() -> None:
    """Print the figures."""
    options = parser("benchmarks.rebalance", __doc__)
    options.add_argument("--model", default="smollm2-moe")
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--topics", choices=("one", "zipf"), default="one")
    options.add_argument("--streams", type=int, default=8)
    options.add_argument("--seconds", type=float, default=30.0, help="of each half")
    options.add_argument("--json", type=Path, help="write the figures to this file")
    given = options.parse_args()
    with launched(given.model, given.ranks) as server:
        result = asyncio.run(measure(server.address, given.streams, given.seconds, given.topics))
    for name, value in result.items():
        print(f"{name}: {value}")
    write_json(given.json, result)


if __name__ == "__main__":
    main()
