"""Prompts and decode apart, on a real server: the tokens of collocated ranks, whichever rank or pool is lost."""

import signal
from collections.abc import Iterator

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.streams import Traffic, kill, wait_until, wait_until_whole

PREFILL, DECODE = (0, 1), (2, 3)


@pytest.fixture(scope="module")
def pools() -> Iterator[Server]:
    """Two ranks for prompts and two that decode."""
    with Server(model=str(TINY), arch="pd", prefill=2, decode=2, buckets=FEW_BUCKETS, chaos=True) as server:
        yield server


@pytest.fixture
def client(pools: Server) -> Iterator[Client]:
    """A client, once all ranks serve; nothing may be compiled, and nothing is left behind."""
    with Client(pools) as client:
        wait_until_whole(client)
        compiles = client.status().compiles_after_ready
        yield client
        wait_until(lambda: client.status().running + client.status().waiting == 0, "all requests have ended")
        assert client.status().compiles_after_ready == compiles
        assert all(rank.pages_used == 0 for rank in client.status().ranks if rank.state == "serving")


def test_they_say_what_collocated_ranks_say(client: Client, traffic: Traffic) -> None:
    before = client.status()
    traffic.during(client)
    after = client.status()
    assert after.requests_sent - before.requests_sent == len(traffic.known)
    assert [pool.name for pool in after.pools] == ["prefill", "decode"]
    assert [rank.role for rank in after.ranks] == ["prefill"] * 2 + ["decode"] * 2


@pytest.mark.parametrize("rank", [PREFILL[0], DECODE[1]])
@pytest.mark.parametrize("after", [0.0, 0.3])
def test_the_loss_of_a_rank_of_either_pool_changes_no_token(
    client: Client, traffic: Traffic, rank: int, after: float
) -> None:
    traffic.during(client, kill(client, rank), after=after)


def test_a_stopped_rank_of_either_pool_changes_no_token(client: Client, traffic: Traffic) -> None:
    traffic.during(client, kill(client, PREFILL[1], signal.SIGSTOP), kill(client, DECODE[0], signal.SIGSTOP))


@pytest.mark.parametrize("side", [PREFILL, DECODE, (*PREFILL[:1], *DECODE[1:])])
@pytest.mark.parametrize("after", [0.0, 0.3])
def test_the_other_pool_takes_over_from_one_that_died(
    client: Client, traffic: Traffic, side: tuple[int, ...], after: float
) -> None:
    acts = [kill(client, rank) for rank in side]
    traffic.during(client, *acts, after=after)
    traffic.during(client)
