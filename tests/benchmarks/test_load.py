"""The load benchmark: its account adds up, and overload is refused, not lost."""

import argparse
import dataclasses

import pytest

from benchmarks.load import Load, measure, verdict
from benchmarks.streams import Ask, Trace
from tests.support.fake_backend import MODEL, FakeBackend
from tests.support.fake_server import serve

ASK = Ask("a", 0.0, 1, 3)


def trace(tokens: int, error: str | None = None, first: float = 0.5) -> Trace:
    return Trace(ASK, 0.0, times=[first + i for i in range(tokens)], tokens=list(range(tokens)), error=error)


def test_every_request_is_whole_refused_or_lost():
    traces = [trace(3), trace(3, first=2.0), trace(0, "QueueFull: later"), trace(2), trace(3, "Internal: x"), trace(0)]
    load = Load.of(traces, 3.0, 1.0, 2.0)
    assert (load.sent, load.whole, load.refused, load.lost) == (6, 2, 1, 3)
    assert load.goodput == 3.0
    assert load.admitted_ttft_p99_ms == 2000.0


def test_the_verdict_is_of_the_highest_load():
    loads = [Load.of([trace(3)] * n, factor, 1.0, 1.0) for n, factor in ((4, 1.0), (2, 3.0))]
    assert verdict(loads) | {"loads": 0} == {
        "peak_goodput": 12.0,
        "goodput_at_3x": 6.0,
        "admitted_ttft_p99_ms": 500.0,
        "lost": 0,
        "loads": 0,
    }


@pytest.mark.anyio
async def test_overload_is_refused_and_nothing_is_lost():
    backend = FakeBackend(model=dataclasses.replace(MODEL, max_context=4096), delay_s=0.02, max_queue=6)
    options = argparse.Namespace(
        places=5, prompt_tokens=2, max_tokens=4, factors=(0.5, 4.0), seconds=2.5, idle=50, slow=3
    )
    async with serve(backend) as server:
        options.http = server.url.removeprefix("http://")
        result = await measure(server.address, options)
    assert result["lost"] == 0
    assert result["slow_bytes"] >= result["slow_readers"] == 3, "who reads slowly was there"
    calm, crowded = result["loads"]
    assert crowded["refused"] > calm["refused"]
    assert crowded["whole"] > 0
    assert backend.running == 0
