"""Ranks that dial in from other hosts, over mutual TLS: they die, vanish and come back, and not a token changes."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.joining import JoinFiles, free_address, host_agent
from tests.support.streams import Traffic, events_since, kill, last_event, pid_of, wait_until, wait_until_whole

LABELS = ("amber", "birch", "cedar")
SLOTS = {"amber": 2}
"""A host with several slots passes on the streams of its ranks; each of the others has a stream of its own."""


class Hosts:
    """Three hosts with four ranks, in a server that they have joined."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.front = free_address()
        self.join_files = JoinFiles.made(folder, "127.0.0.1")
        self._stack = stack
        self.processes: dict[str, subprocess.Popen] = {label: self.start(label) for label in LABELS}

    def start(self, label: str) -> subprocess.Popen:
        """The host called so joins."""
        arguments = [*self.join_files.arguments(), "--count", str(SLOTS.get(label, 1))]
        process = self._stack.enter_context(host_agent(label, self.front, arguments))
        return process


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        yield Hosts(tmp_path_factory.mktemp("join_files"), stack)


@pytest.fixture(scope="module")
def joined(hosts: Hosts) -> Iterator[Client]:
    settings = hosts.join_files.settings(hosts.front) | {"buckets": FEW_BUCKETS, "lattice_depth": 1}
    with Server(model=str(TINY), ranks=4, chaos=True, **settings) as server, Client(server) as client:
        wait_until_whole(client)
        yield client


@pytest.fixture(scope="module")
def traffic(joined: Client) -> Traffic:
    return Traffic.record(joined, streams=6, prompt_tokens=40, max_tokens=60)


def rank_on(client: Client, label: str) -> int:
    return next(rank.id for rank in client.status().ranks if rank.host == label)


def test_every_rank_is_on_the_host_that_it_said(joined: Client) -> None:
    ranks = joined.status().ranks
    assert [rank.host for rank in ranks] == ["amber", "amber", "birch", "cedar"]
    assert [rank.relay for rank in ranks] == ["amber", "amber", "", ""]


def test_a_joined_rank_that_is_killed_changes_no_token_and_comes_back(joined: Client, traffic: Traffic) -> None:
    before = joined.status().compiles_after_ready
    traffic.during(joined, kill(joined, 1))
    wait_until_whole(joined)
    assert joined.status().compiles_after_ready == before == 0


def test_connections_that_are_reset_between_living_hosts_cost_no_rank_no_request_and_no_token(
    joined: Client, traffic: Traffic
) -> None:
    before, status = last_event(joined), joined.status()
    traffic.during(joined, lambda: joined.kill(1, "LINKS"))
    kinds = [event.kind for event in events_since(joined, before)]
    assert "step_failed" in kinds
    assert {"rank_lost", "suspected"}.isdisjoint(kinds)
    after = joined.status()
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in status.ranks]
    assert after.generation == status.generation + 1
    assert after.compiles_after_ready == 0
    wait_until_whole(joined)


def test_a_joined_rank_that_hangs_is_killed_by_its_host_agent(joined: Client, traffic: Traffic) -> None:
    pid = pid_of(joined.status(), rank_on(joined, "amber"))
    traffic.during(joined, lambda: joined.kill(rank_on(joined, "amber"), "SIGSTOP"))
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the stopped process is gone")
    wait_until_whole(joined)


def test_a_host_agent_that_hangs_is_lost_with_its_ranks_and_changes_no_token(
    hosts: Hosts, joined: Client, traffic: Traffic
) -> None:
    before, agent = last_event(joined), hosts.processes["amber"]
    relayed = {rank.id for rank in joined.status().ranks if rank.relay == "amber"}
    traffic.during(joined, lambda: agent.send_signal(signal.SIGSTOP))
    lost = {event.rank: event.cause for event in events_since(joined, before) if event.kind == "rank_lost"}
    assert lost.keys() == relayed
    assert not any(joined.status().ranks[rank].relay for rank in relayed)
    agent.send_signal(signal.SIGCONT)
    wait_until_whole(joined)
    assert {rank.id for rank in joined.status().ranks if rank.relay == "amber"} == relayed
    traffic.during(joined)
    assert joined.status().compiles_after_ready == 0


def test_a_host_that_vanishes_changes_no_token_and_is_taken_in_again(
    hosts: Hosts, joined: Client, traffic: Traffic
) -> None:
    before, gone = last_event(joined), {rank.id for rank in joined.status().ranks if rank.host == "amber"}
    traffic.during(joined, lambda: hosts.processes["amber"].send_signal(signal.SIGKILL))
    lost = {event.rank: event.cause for event in events_since(joined, before) if event.kind == "rank_lost"}
    assert lost.keys() == gone
    assert {cause.partition(":")[0] for cause in lost.values()} <= {"exited", "stream"}
    assert {joined.status().ranks[rank].state for rank in gone} <= {"starting", "dead"}
    hosts.start("amber")
    wait_until_whole(joined)
    traffic.during(joined)


def test_a_rank_goes_on_where_another_host_has_a_free_slot(hosts: Hosts, joined: Client, traffic: Traffic) -> None:
    gone = rank_on(joined, "birch")
    spare = hosts.start("dogwood")
    assert spare.stderr is not None
    assert any("is prepared" in line for line in spare.stderr)  # it has a free slot
    traffic.during(joined, lambda: hosts.processes["birch"].send_signal(signal.SIGKILL))
    wait_until_whole(joined)
    assert joined.status().ranks[gone].host == "dogwood"
    traffic.during(joined, kill(joined, gone))
    wait_until_whole(joined)
