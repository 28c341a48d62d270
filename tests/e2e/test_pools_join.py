"""Prompts and decode apart on hosts that share no memory: entries go from one to the other through the front, and no
token changes, whichever rank, pool or host is lost."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.joining import JoinFiles, free_address, host_agent
from tests.support.streams import Traffic, kill, wait_until, wait_until_whole

PREFILL, DECODE = 0, (1, 2)
HOSTS = ("alder", "briar", "clover")


@pytest.fixture(scope="module")
def agents() -> dict[str, subprocess.Popen]:
    """The host agent of each host."""
    return {}


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory, agents: dict[str, subprocess.Popen]) -> Iterator[Client]:
    """A rank for prompts on one host, and two that decode on two others."""
    front, files = free_address(), JoinFiles.made(tmp_path_factory.mktemp("join_files"), "127.0.0.1")
    with contextlib.ExitStack() as stack:
        for host in HOSTS:
            agents[host] = stack.enter_context(host_agent(host, front, files.arguments()))
        settings: dict[str, Any] = files.settings(front) | {
            "arch": "pd",
            "prefill": 1,
            "decode": 2,
            "buckets": FEW_BUCKETS,
        }
        with Server(model=str(TINY), chaos=True, **settings) as server, Client(server) as client:
            yield client


@pytest.fixture
def client(pools: Client) -> Iterator[Client]:
    """A client, once all ranks serve; nothing may be compiled, and nothing is left behind."""
    wait_until_whole(pools)
    yield pools
    wait_until(lambda: pools.status().running + pools.status().waiting == 0, "all requests have ended")
    status = pools.status()
    assert status.compiles_after_ready == 0
    assert all(rank.pages_used == 0 for rank in status.ranks if rank.state == "serving")


def test_the_entries_of_prompts_go_to_ranks_on_other_hosts(client: Client, traffic: Traffic) -> None:
    traffic.during(client)
    status = client.status()
    assert status.requests_sent == len(traffic.known)
    assert [(rank.host, rank.role) for rank in status.ranks] == list(
        zip(HOSTS, ("prefill", "decode", "decode"), strict=True)
    )
    assert status.protection == "stream"


@pytest.mark.parametrize("ranks", [(PREFILL,), DECODE[:1], DECODE], ids=["prefill", "decode", "all that decode"])
def test_no_loss_of_a_rank_or_of_a_pool_changes_a_token(
    client: Client, traffic: Traffic, ranks: tuple[int, ...]
) -> None:
    traffic.during(client, *(kill(client, rank) for rank in ranks), after=0.2)
    traffic.during(client)


def test_a_host_that_vanishes_changes_no_token(
    client: Client, agents: dict[str, subprocess.Popen], traffic: Traffic
) -> None:
    gone = next(rank.id for rank in client.status().ranks if rank.host == HOSTS[1])
    traffic.during(client, lambda: agents[HOSTS[1]].send_signal(signal.SIGKILL))
    assert gone in DECODE
    assert client.status().ranks[gone].state != "serving"
