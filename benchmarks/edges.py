"""The latency that an edge adds: `python -m benchmarks.edges`.

Plain HTTP streams of a server whose front holds the connections and of one with an edge, in turns: milliseconds to the
first token, and between two tokens, at the median.
"""

import argparse
import asyncio
import contextlib
import statistics
from collections.abc import Sequence

from benchmarks.http_streams import http_client, play_http
from benchmarks.launch import Launched
from benchmarks.streams import Ask, Trace


async def measure(address: str, streams: int, tokens: int) -> list[Trace]:
    """So many streams at once."""
    asks = [Ask(f"Once upon a time {number}", 0.0, number, tokens) for number in range(streams)]
    async with http_client(address, streams) as client:
        return await asyncio.gather(*(play_http(client, ask) for ask in asks))


def figures(traces: Sequence[Trace]) -> tuple[float, float]:
    """Median milliseconds to the first token, and from token to token of a stream on average: several may arrive at
    once. Raises RuntimeError when a stream failed."""
    failed = next((trace.error for trace in traces if trace.error), None)
    if failed is not None:
        raise RuntimeError(f"a stream failed: {failed}")
    first = [trace.times[0] - trace.sent for trace in traces]
    gaps = [(trace.times[-1] - trace.times[0]) / (len(trace.times) - 1) for trace in traces]
    return 1e3 * statistics.median(first), 1e3 * statistics.median(gaps)


def main() -> None:
    """Print the figures of both servers, and what the edge adds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=100, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each server, in turns")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        servers = []
        for edges in (0, 1):
            server = Launched(options.model, options.ranks, options=("--edges", str(edges)))
            stack.callback(server.stop)
            servers.append(server.http)
        print("streams | what | front, ms | edge, ms | added, ms")
        for streams in (1, 8):
            traces: list[list[Trace]] = [[], []]
            for number in range(options.rounds + 1):
                for server, found in zip(servers, traces, strict=True):
                    measured = asyncio.run(measure(server, streams, options.tokens))
                    found += measured if number else []  # the first time is not counted
            for what, front, edge in zip(("first token", "between tokens"), *map(figures, traces), strict=True):
                print(f"{streams} | {what} | {front:.2f} | {edge:.2f} | {edge - front:+.2f}")


if __name__ == "__main__":
    main()
