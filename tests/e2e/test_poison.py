"""Real ranks that fail of themselves: a crash ends no stream, and a request that breaks every rank ends after two."""

import asyncio
import signal

import pytest

from serving.api.client import Client
from serving.errors import PoisonRequest
from serving.protocol.events import EventKind
from serving.protocol.request import Request
from serving.protocol.sampling import ResolvedSampling
from serving.server import Server
from tests.support.streams import Traffic, events_since, kill, last_event, wait_until_whole

pytestmark = pytest.mark.xdist_group("the server of conftest")


def run_unchecked(server: Server, request: Request) -> None:
    """Run a request that no surface has checked, as one of another version's journal would be."""
    assert server.app is not None
    loop = server.app.loop

    async def read() -> None:
        async for _ in loop.stream(request):
            pass

    assert loop._task is not None
    asyncio.run_coroutine_threadsafe(read(), loop._task.get_loop()).result(120)


def test_a_crash_under_streams_ends_none_and_its_cause_is_reported(whole: Client, traffic: Traffic) -> None:
    before = last_event(whole)
    traffic.during(whole, kill(whole, 1, signal.SIGSEGV))
    events = list(events_since(whole, before))
    (cause,) = [event.cause for event in events if event.kind == EventKind.RANK_LOST]
    assert cause.startswith("exited: process ended with signal 11: Fatal Python error: Segmentation fault")
    assert {EventKind.SUSPECTED, EventKind.CLEARED} <= {event.kind for event in events}
    assert EventKind.CONVICTED not in {event.kind for event in events}
    assert whole.status().ranks[1].last_failure == cause
    wait_until_whole(whole)


def test_a_request_that_breaks_ranks_ends_after_two_and_the_others_go_on(
    server: Server, whole: Client, traffic: Traffic
) -> None:
    before, convicted = last_event(whole), whole.status().convicted
    sampling = ResolvedSampling(max_tokens=4, seed=0, logit_bias=((10**6, 1.0),))

    def poison() -> None:
        with pytest.raises(PoisonRequest, match=r"poison was ended: ranks \d, \d failed"):
            run_unchecked(server, Request(id="poison", prompt=(5, 6, 7), sampling=sampling))

    traffic.during(whole, poison)
    lost = [event for event in events_since(whole, before) if event.kind == EventKind.RANK_LOST]
    assert len(lost) == 2
    for event in lost:
        assert event.cause.startswith("raised: IndexError: index 1000000 is out of bounds")
        assert "dense_adjustments" in event.cause
    assert whole.status().convicted == convicted + 1
    wait_until_whole(whole)
