"""The kill runs: who dies, and the figures of a loss of a pool."""

import argparse
import asyncio
import dataclasses
import os
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import kills
from benchmarks.faults import taken_over_ms
from benchmarks.streams import Ask, Known, Trace
from serving.config import Settings
from serving.protocol.status import RankStatus
from tests.support.fake_backend import FakeBackend

ASK = Ask("To be", 0.0, 0, 4)


def trace(times: list[float], **fields: Any) -> Trace:
    """A stream of ASK with a token at each of `times`."""
    return dataclasses.replace(Trace(ASK, 0.0, times=times, tokens=list(range(len(times)))), **fields)


@pytest.mark.parametrize("arch", ["collocated", "disaggregated", "pd"])
def test_the_server_under_test_can_be_made_of_the_flags(arch: str) -> None:
    flags = kills.options_of(argparse.Namespace(arch=arch, ranks=5, speculate="ngram"))
    values: dict[str, Any] = {
        name.removeprefix("--"): int(value) if value.isdigit() else value
        for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    settings = Settings.load(environment={}, **{"ranks": 5, **values})
    assert (settings.arch, settings.ranks, settings.speculate) == (arch, 5, "ngram")


@pytest.mark.parametrize("serving", [(0, 1), (0, 1, 2), (0, 1, 2, 3)])
def test_one_rank_is_left_alive_of_both_pools_together(monkeypatch, serving: tuple[int, ...]) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, how: killed.append(pid))
    monkeypatch.setattr(kills, "LONGEST_WAIT_S", 0.0)
    monkeypatch.setattr(kills, "HURRIES", 1.0)
    monkeypatch.setattr(kills, "PAIRS", 1.0)
    ranks = tuple(
        RankStatus(id=rank, pid=rank, host="here", state="serving" if rank in serving else "starting", role=role)
        for rank, role in enumerate(("prefill", "prefill", "decode", "decode"))
    )
    status = dataclasses.replace(FakeBackend().status(), ranks=ranks)

    async def asked() -> Any:
        return status

    killer = kills.Killer(cast(Any, SimpleNamespace(status=asked)), random.Random(1))
    asyncio.run(killer.strike())
    assert set(killed) < set(serving)
    assert killer.kills == len(killed) == min(2, len(serving) - 1)


def test_a_stream_that_still_runs_is_compared_as_far_as_it_has_come_and_one_that_ended_in_full() -> None:
    run = kills.Kills(cast(Any, None), Known([trace([1.0, 2.0, 3.0, 4.0])]), random.Random(1))
    run.load.traces = [trace([1.0, 2.0]), trace([1.0, 2.0], tokens=[0, 7]), trace([], error="Cancelled: x")]
    figures = run.figures()
    assert (figures["requests"], figures["lost"], figures["changed"]) == (3, 1, 1)
    assert run.known.changed(run.load.traces) == 2


def test_the_other_pool_has_taken_over_when_streams_get_tokens_after_the_lost_one_was_given_up() -> None:
    traces = [
        trace([0.5, 1.01, 1.4]),
        trace([0.6, 1.6]),
        trace([0.9, 1.15, 1.5, 3.0]),
        trace([1.3], sent=1.2),
        trace([0.7]),
    ]
    assert taken_over_ms(traces, moment=1.0, given_up=1.1) == pytest.approx(500)
    assert taken_over_ms([], moment=1.0, given_up=1.1) is None
