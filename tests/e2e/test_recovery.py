"""Real ranks die, in every way, while real streams run; not a token is lost, changed or said twice."""

import os
import signal
import time

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.streams import (
    Traffic,
    events_since,
    kill,
    last_event,
    pid_of,
    wait_until,
    wait_until_whole,
)


def slow(*values: object) -> list[object]:
    """Parameters of the slow tests: other ranks in the same place, or other numbers."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("rank", [0, *slow(1, 2, 3)])  # `test_prepare_ahead` kills each of them
def test_a_rank_killed_in_decode_changes_no_token(whole: Client, traffic: Traffic, rank: int) -> None:
    before, epoch = last_event(whole), whole.status().epoch
    compiles = whole.status().compiles_after_ready
    for _ in range(5):  # on a busy machine the streams may all have ended just before the kill
        streams = traffic.during(whole, kill(whole, rank))
        if {max(stream.epochs) for stream in streams} != {epoch}:
            break
        wait_until_whole(whole)
        before, epoch = last_event(whole), whole.status().epoch
    else:
        raise AssertionError("no stream went on in the epoch after the loss")
    kinds = [event.kind for event in events_since(whole, before)]
    assert "rank_lost" in kinds
    assert "recovered" in kinds
    wait_until_whole(whole)
    assert whole.status().compiles_after_ready == compiles == 0


@pytest.mark.parametrize("rank", [2, *slow(0, 1, 3)])
def test_a_rank_killed_in_prefill_changes_no_token(whole: Client, rank: int) -> None:
    long = Traffic.record(whole, streams=4, prompt_tokens=400, max_tokens=4)
    long.during(whole, kill(whole, rank), after=0.0)


def test_a_rank_that_is_stopped_is_fenced_and_changes_no_token(whole: Client, traffic: Traffic) -> None:
    before, pid = last_event(whole), pid_of(whole.status(), 2)
    traffic.during(whole, kill(whole, 2, signal.SIGSTOP))
    causes = [event.cause for event in events_since(whole, before) if event.kind == "rank_lost"]
    assert any("stopped" in cause or "heartbeat" in cause for cause in causes)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the stopped process is gone")


def test_two_ranks_killed_one_after_the_other_change_no_token(whole: Client, traffic: Traffic) -> None:
    second = kill(whole, 3)
    traffic.during(whole, kill(whole, 0), lambda: time.sleep(0.6), second, after=0.2)


def test_a_rank_killed_during_the_recovery_from_another_changes_no_token(whole: Client, traffic: Traffic) -> None:
    second, before = kill(whole, 1), last_event(whole)

    def as_soon_as_the_loss_is_seen() -> None:
        wait_until(lambda: any(e.kind == "rank_lost" for e in events_since(whole, before)), "the loss is seen")
        second()

    traffic.during(whole, kill(whole, 2), as_soon_as_the_loss_is_seen, after=0.2)


def test_two_ranks_killed_at_once_change_no_token(whole: Client, traffic: Traffic) -> None:
    traffic.during(whole, kill(whole, 1), kill(whole, 2))


def test_a_rank_killed_while_a_replacement_joins_changes_no_token(whole: Client, traffic: Traffic) -> None:
    victim = kill(whole, 3)

    def as_it_joins() -> None:
        wait_until(lambda: whole.status().ranks[0].state == "joining", "a replacement joins")
        victim()

    traffic.during(whole, kill(whole, 0), as_it_joins, after=0.1)


def test_a_replacement_may_die_while_it_joins(whole: Client, traffic: Traffic) -> None:
    def as_it_joins() -> None:
        wait_until(lambda: whole.status().ranks[0].state == "joining", "a replacement joins")
        kill(whole, 0)()

    traffic.during(whole, kill(whole, 0), as_it_joins, after=0.1)
    wait_until_whole(whole)


def test_even_the_loss_of_all_ranks_loses_no_stream(whole: Client, traffic: Traffic) -> None:
    traffic.during(whole, *(kill(whole, rank) for rank in range(4)))


def test_an_idle_rank_may_die_and_its_replacement_joins_the_generation_there_is(whole: Client) -> None:
    generation = whole.status().generation
    kill(whole, 1)()
    wait_until(lambda: whole.status().ranks[1].state != "serving", "the loss is seen")
    wait_until_whole(whole)
    assert whole.status().generation == generation
    assert whole.generate([5, 6, 7], max_tokens=3, ignore_eos=True).reason == "length"


@pytest.mark.parametrize("data_type", ["int8", *slow("float32", "bfloat16", "int4")])
def test_ranks_die_one_after_the_other_down_to_the_last(data_type: str) -> None:
    settings = {"model": str(TINY), "ranks": 3, "restart": False, "chaos": True, "data_type": data_type}
    settings |= {"buckets": FEW_BUCKETS}
    with Server(**settings) as server, Client(server) as client:
        traffic = Traffic.record(client, streams=6, prompt_tokens=30, max_tokens=30)
        for victim in (0, 2):
            traffic.during(client, kill(client, victim))
            assert client.status().ready
        assert [rank.state for rank in client.status().ranks] == ["dead", "serving", "dead"]
        # The last rank holds every expert now.
        assert {len(set(layer)) for layer in client.status().ranks[1].slots} == {8}
