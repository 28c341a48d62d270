"""Tensor groups over real ranks: whichever rank dies, its group's requests go to complete groups, and no token
changes."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from serving.api.client import Client
from serving.errors import NoCapacity
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.drafts import accepted, answers, parts
from tests.support.processes import supervised
from tests.support.streams import Traffic, events_since, kill, last_event, wait_until, wait_until_whole


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Four ranks in two groups."""
    with Server(model=str(TINY), ranks=4, tensor=2, buckets=FEW_BUCKETS, chaos=True, operate=True) as server:
        yield server


@pytest.fixture
def whole(server: Server) -> Iterator[Client]:
    """A client of the server, all of whose ranks serve."""
    with Client(server) as client:
        wait_until_whole(client)
        yield client


@pytest.fixture(scope="module")
def traffic(server: Server) -> Traffic:
    """Requests and their answers."""
    with Client(server) as client:
        return Traffic.record(client, streams=8, prompt_tokens=70, max_tokens=40)


def roles(client: Client) -> list[str]:
    return [rank.role if rank.state == "serving" else rank.state for rank in client.status().ranks]


def test_drafts_change_no_bit_of_an_answer(whole: Client) -> None:
    wait_until_whole(whole)
    compiles, drafted = whole.status().compiles_after_ready, answers(whole, speculate=True)
    assert parts(drafted) == parts(answers(whole, speculate=False))
    assert accepted(drafted) > 0
    assert whole.status().compiles_after_ready == compiles


def test_a_rank_killed_takes_its_group_along_and_its_contexts_come_back_from_the_copies_of_all_ranks_of_the_group(
    whole: Client, traffic: Traffic
) -> None:
    status, before = whole.status(), last_event(whole)

    def kill_a_busy_one() -> None:
        busiest = max(whole.status().ranks, key=lambda rank: rank.running)
        assert busiest.running
        kill(whole, busiest.id)()
        wait_until(lambda: roles(whole)[busiest.id ^ 1] == "expert", "the other rank of the group holds experts only")

    traffic.during(whole, kill_a_busy_one)
    assert whole.status().tokens_restored > status.tokens_restored
    assert "recovered" in {event.kind for event in events_since(whole, before)}
    wait_until_whole(whole)
    assert roles(whole) == ["collocated"] * 4
    traffic.during(whole)
    assert whole.status().compiles_after_ready == 0
    again = whole.status().tokens_recomputed - status.tokens_recomputed
    assert again < status.page_size * len(traffic.known)  # at most what was not copied yet of each stream's last page


@pytest.mark.parametrize("victims", [pytest.param((1, 2), marks=pytest.mark.slow), (0, 1)], ids=str)
def test_what_is_left_of_two_groups_is_a_group(whole: Client, traffic: Traffic, victims: tuple[int, int]) -> None:
    traffic.during(whole, *(kill(whole, victim) for victim in victims))
    wait_until_whole(whole)
    traffic.during(whole)


def test_without_a_whole_group_requests_wait_until_one_is_back(whole: Client, traffic: Traffic) -> None:
    before = last_event(whole)
    traffic.during(whole, *(kill(whole, victim) for victim in (0, 1, 3)))
    said = [event.message for event in events_since(whole, before) if event.kind == "no_capacity"]
    assert any("no tensor group of 2 ranks" in message for message in said), said
    wait_until_whole(whole)


def test_ranks_without_which_nobody_could_serve_are_not_drained(whole: Client) -> None:
    with pytest.raises(NoCapacity, match="make no tensor group of 2"):
        whole.apply("drain", 0, 1, 2)


def test_a_rank_that_is_stopped_changes_no_token(whole: Client, traffic: Traffic) -> None:
    traffic.during(whole, kill(whole, 3, signal.SIGSTOP))


def test_a_rank_killed_during_the_recovery_from_another_changes_no_token(whole: Client, traffic: Traffic) -> None:
    second = kill(whole, 2)
    traffic.during(whole, kill(whole, 1), lambda: time.sleep(0.01), second)


def test_a_drain_moves_the_requests_of_the_group_and_computes_nothing_again(whole: Client, traffic: Traffic) -> None:
    before, computed = last_event(whole), whole.status().tokens_recomputed
    traffic.during(whole, lambda: whole.apply("drain", 1, replace=True))
    assert "drained" in {event.kind for event in events_since(whole, before)}
    assert whole.status().tokens_recomputed == computed
    wait_until_whole(whole)


def test_a_front_that_finds_no_whole_group_waits_for_one() -> None:
    with supervised("--ranks", "2", "--tensor", "2") as server, Client(server.address) as client:
        wait_until_whole(client)
        known = Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=60)
        known.during(client, lambda: os.kill(server.front(), signal.SIGKILL), after=0.2)
        wait_until_whole(client)
        known.during(client, lambda: server.kill_with(client, 1), after=0.2)
        wait_until_whole(client)


@pytest.mark.parametrize("protection", ["stream", pytest.param("off", marks=pytest.mark.slow)])
def test_groups_over_two_hosts_with_streamed_replicas_or_none(protection: str) -> None:
    settings = {"tensor": 2, "hosts": 2, "buckets": FEW_BUCKETS, "data_type": "int8", "kv_replication": protection}
    with Server(model=str(TINY), ranks=4, chaos=True, **settings) as server, Client(server) as client:
        wait_until_whole(client)
        known = Traffic.record(client, streams=6, prompt_tokens=60, max_tokens=40)
        known.during(client, kill(client, 2))
        wait_until_whole(client)
        known.during(client, lambda: client.kill(0, host="host0"))
        wait_until_whole(client)
        status = client.status()
        assert status.compiles_after_ready == 0
        assert (status.tokens_restored > 0) == (protection == "stream")
