"""Attention ranks and expert ranks of a real server: the tokens of collocated ranks, whichever of them dies."""

import os
import signal
from collections.abc import Iterator

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import TINY
from tests.support.drafts import accepted, answers, parts
from tests.support.streams import Traffic, events_since, kill, last_event, wait_until, wait_until_whole

ATTENTION, EXPERTS = (0, 1), (2, 3)


@pytest.fixture(scope="module")
def roles(traffic: Traffic) -> Iterator[Server]:
    """Two attention ranks and two expert ranks; `traffic` was recorded on collocated ones before."""
    settings = {"buckets": ((8, 0), (8, 2)), "lattice_depth": 2, "survive": 1}
    with Server(model=str(TINY), arch="disaggregated", attention=2, experts=2, **settings) as server:
        yield server


@pytest.fixture
def apart(roles: Server) -> Iterator[Client]:
    """A client of them."""
    with Client(roles) as client:
        yield client


def test_each_rank_has_what_its_role_takes_and_nothing_else(apart: Client) -> None:
    for rank in apart.status().ranks:
        attends = rank.id in ATTENTION
        assert rank.role == ("attention" if attends else "expert")
        assert bool(rank.pages) == attends
        assert bool(rank.slots) != attends


def test_they_say_what_collocated_ranks_say(apart: Client, traffic: Traffic) -> None:
    wait_until_whole(apart)
    traffic.during(apart)


def test_drafts_change_no_bit_of_an_answer(apart: Client) -> None:
    wait_until_whole(apart)
    compiles, drafted = apart.status().compiles_after_ready, answers(apart, speculate=True)
    assert parts(drafted) == parts(answers(apart, speculate=False))
    assert accepted(drafted) > 0
    assert apart.status().compiles_after_ready == compiles


@pytest.mark.parametrize(
    "rank", [0, 3, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 2))]
)  # the others die with their whole side below
def test_the_loss_of_either_kind_changes_no_token(apart: Client, traffic: Traffic, rank: int) -> None:
    wait_until_whole(apart)
    compiles = apart.status().compiles_after_ready
    traffic.during(apart, kill(apart, rank))
    wait_until_whole(apart)
    assert apart.status().compiles_after_ready == compiles


def test_a_stopped_expert_rank_changes_no_token(apart: Client, traffic: Traffic) -> None:
    wait_until_whole(apart)
    traffic.during(apart, kill(apart, EXPERTS[0], signal.SIGSTOP))


def test_a_new_generation_has_what_each_role_had(roles: Server, apart: Client, traffic: Traffic) -> None:
    wait_until_whole(apart)
    assert roles.app is not None
    generation, pid = apart.status().generation, roles.app.failover.coordinator_pid
    assert pid is not None
    traffic.during(apart, lambda: os.kill(pid, signal.SIGKILL), kill(apart, EXPERTS[1]))
    wait_until(lambda: apart.status().generation > generation, "the replacement has cost a new generation")
    wait_until_whole(apart)
    traffic.during(apart, kill(apart, ATTENTION[1]))


@pytest.mark.parametrize("side", [ATTENTION, EXPERTS])
def test_a_rank_of_the_other_side_takes_the_place_of_a_side_that_died(
    apart: Client, traffic: Traffic, side: tuple[int, ...]
) -> None:
    wait_until_whole(apart)
    acts, before = [kill(apart, rank) for rank in side], last_event(apart)
    traffic.during(apart, *acts)
    assert any(event.kind == "recovered" for event in events_since(apart, before))
    wait_until_whole(apart)
    assert [rank.role for rank in apart.status().ranks] == ["attention"] * 2 + ["expert"] * 2
