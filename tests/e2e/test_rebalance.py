"""Experts move to other ranks by the load while streams run; also while a rank is killed. No token changes."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator

import pytest

from serving.api.client import Client
from serving.errors import NoCapacity
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.streams import Traffic, events_since, last_event, pid_of, wait_until, wait_until_whole


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Three ranks of the tiny model, none of which holds all experts."""
    with Server(model=str(TINY), ranks=3, chaos=True, buckets=FEW_BUCKETS, lattice_depth=1) as server:
        yield server


@pytest.fixture(scope="module")
def known(server: Server) -> Traffic:
    with Client(server) as client:
        wait_until_whole(client)
        return Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=80)


def rebalanced(client: Client, sequence: int) -> list[str]:
    return [event.message for event in events_since(client, sequence) if event.kind == "rebalanced"]


def test_experts_move_to_where_the_load_is_less_and_no_token_changes(server: Server, known: Traffic) -> None:
    with Client(server) as client:
        before, loaded = last_event(client), client.status().experts_loaded
        known.during(client, lambda: client.apply("rebalance"))
        (message,) = rebalanced(client, before)
        after, was = map(float, re.findall(r"\d+\.\d+", message))
        assert after < was, message
        status = client.status()
        assert status.experts_loaded > loaded
        assert (status.masked, status.compiles_after_ready, status.recoveries) == ((), 0, 0)
        known.during(client)


def rebalance(client: Client) -> None:
    with contextlib.suppress(NoCapacity):  # the rank was lost before the instruction came
        client.apply("rebalance")


def test_a_rank_killed_while_experts_move_changes_no_token(server: Server, known: Traffic) -> None:
    with Client(server) as client:
        wait_until_whole(client)
        threads = []

        def move_and_kill() -> None:
            pid = pid_of(client.status(), 1)
            threads.append(threading.Thread(target=rebalance, args=(client,)))
            threads[0].start()
            os.kill(pid, signal.SIGKILL)

        known.during(client, move_and_kill)
        wait_until_whole(client)
        threads[0].join(60)
        assert not threads[0].is_alive()
        known.during(client)
        assert client.status().compiles_after_ready == 0


def test_experts_move_only_while_all_ranks_serve(server: Server) -> None:
    with Client(server) as client:
        wait_until_whole(client)
        client.apply("scale_down", 2)
        with pytest.raises(NoCapacity, match=r"\[2\] do not"):
            client.apply("rebalance")
        client.apply("scale_up", 2)
        wait_until(lambda: client.status().ranks[2].state == "serving", "the rank serves again")
