"""The figures of one server: bursts of requests, long prompts, memory, and its start."""

import asyncio
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence

import httpx

from benchmarks.http_streams import http_client
from benchmarks.peers.servers import Play, Running
from benchmarks.streams import TEXT, Ask, Trace
from benchmarks.throughput import percentile

_BURSTS = {1: 4}
"""Measured bursts at a number of streams; two at any other."""
_LONG_PROMPTS = 3


@dataclasses.dataclass(frozen=True)
class Workload:
    """The requests that every server gets."""

    concurrency: tuple[int, ...]
    prompt_characters: int
    """Of a yardstick each is a token."""
    max_tokens: int
    long_prompt: int
    """Characters of the prompts that measure prefill; 0 for none."""


@dataclasses.dataclass(frozen=True)
class Burst:
    """Figures of `streams` requests that were sent together, over all bursts of this size. Times in milliseconds."""

    streams: int
    tokens_per_s: float
    ttft_ms: float
    gap_ms: float
    gap_p99_ms: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one server in one round."""

    bursts: tuple[Burst, ...]
    prefill_tokens_per_s: float | None
    first_token_s: float
    """From the command that starts the server to its first token."""
    memory_mb: float
    """Of all its processes, after the load."""


async def measure(server: Running, load: Workload, seed: int) -> Figures:
    """All figures. Raises RuntimeError when a request fails."""
    asks = _asks(load, seed)
    async with http_client(server.address, max(load.concurrency)) as client:
        await _together(client, server.play, [_take(asks, 1)[0]])
        first_token_s = time.monotonic() - server.started
        bursts = []
        for streams in load.concurrency:
            await _together(client, server.play, _take(asks, streams))
            measured = [
                await _together(client, server.play, _take(asks, streams)) for _ in range(_BURSTS.get(streams, 2))
            ]
            bursts.append(burst_of(streams, measured))
        prefill = await _prefill(client, server.play, load, seed) if load.long_prompt else None
    return Figures(tuple(bursts), prefill, round(first_token_s, 1), round(server.memory() / 1e6, 1))


def burst_of(streams: int, bursts: Sequence[Sequence[Trace]]) -> Burst:
    """The figures of bursts of one size: the rate is that of their tokens over their times, from the first request
    to the last token; waits and gaps are medians over all streams."""
    took = sum(max(t.times[-1] for t in each) - min(t.sent for t in each) for each in bursts)
    traces = [trace for each in bursts for trace in each]
    gaps = [1e3 * (b - a) for trace in traces for a, b in itertools.pairwise(trace.times)]
    return Burst(
        streams,
        round(sum(len(trace.times) for trace in traces) / took, 1),
        round(statistics.median(1e3 * (trace.times[0] - trace.sent) for trace in traces), 1),
        round(statistics.median(gaps), 2),
        round(percentile(gaps, 99), 2),
    )


async def _prefill(client: httpx.AsyncClient, play: Play, load: Workload, seed: int) -> float:
    """Tokens of a long prompt over the wait for the first token, one prompt at a time: the median."""
    text, rates = TEXT.read_text(), []
    for i in range(_LONG_PROMPTS):
        start = 1 + seed + i * load.long_prompt
        ask = Ask(text[start : start + load.long_prompt], 0.0, i, 1)
        (trace,) = await _together(client, play, [ask])
        rates.append(load.long_prompt / (trace.times[0] - trace.sent))
    return round(statistics.median(rates), 1)


async def _together(client: httpx.AsyncClient, play: Play, asks: Sequence[Ask]) -> list[Trace]:
    traces = await asyncio.gather(*(play(client, ask) for ask in asks))
    failed = next((trace.error for trace in traces if trace.error is not None), None)
    if failed is not None:
        raise RuntimeError(f"a request of {len(asks)} sent together failed: {failed}")
    return traces


def _asks(load: Workload, seed: int) -> Iterator[Ask]:
    """Greedy requests, each with another part of the text, so that no prefix cache finds one."""
    text = TEXT.read_text()
    count = 1 + sum(streams * (1 + _BURSTS.get(streams, 2)) for streams in load.concurrency)
    step = (len(text) - load.prompt_characters) // (count + 1)
    for i in range(count):
        start = i * step + seed
        yield Ask(text[start : start + load.prompt_characters], 0.0, i, load.max_tokens)


def _take(asks: Iterator[Ask], count: int) -> list[Ask]:
    return list(itertools.islice(asks, count))
