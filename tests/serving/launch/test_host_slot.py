"""A slot on a joined host and the rank in it: each incarnation is ordered once, and ends once."""

import asyncio

import pytest

from serving.launch.host_slot import MAX_INCARNATION, HostSlot, RemoteRank
from serving.launch.rank_process import HostPaths
from serving.proto.moejax.v1 import link_pb2

pytestmark = pytest.mark.anyio

PATHS = HostPaths(host="a", rack="", store="/store", executables="/executables", disk="1")


def slot(token: str = "", incarnation: int = 0) -> HostSlot:
    left = link_pb2.LeftRank(token=token, incarnation=incarnation)
    made = HostSlot(1, link_pb2.Place(host="a", left=left), "peer")
    made.host_paths = PATHS
    return made


def orders(of: HostSlot) -> list[link_pb2.PlaceOrder]:
    """The orders that its agent was not sent yet."""
    found = []
    while not of.orders.empty():
        order = of.orders.get_nowait()
        assert order is not None
        found.append(order)
    return found


async def test_a_rank_is_started_in_a_slot_with_its_number_and_secret() -> None:
    ends: list[str] = []
    here, rank = slot(), RemoteRank(3, 7, ends.append)
    assert here.is_free
    assert rank.is_waiting
    rank.start_in(here)
    assert not here.is_free
    assert not rank.is_waiting
    (order,) = orders(here)
    assert order.start == link_pb2.StartRank(incarnation=7, rank=3, token=rank.token)
    assert (rank.host_paths, ends) == (PATHS, [])
    assert RemoteRank(3, 8, ends.append).token != rank.token


async def test_signals_name_the_incarnation_that_they_are_for_and_stop_with_its_end() -> None:
    here, rank = slot(), RemoteRank(3, 7, lambda how: None)
    rank.start_in(here)
    orders(here)
    rank.signal("SIGSTOP")
    rank.end()
    assert [order.signal for order in orders(here)] == [
        link_pb2.SignalRank(incarnation=7, name=name) for name in ("SIGSTOP", "SIGKILL")
    ]
    rank.mark_ended("process ended with signal 9")
    rank.signal("SIGKILL")
    assert orders(here) == []


async def test_the_end_of_a_rank_is_reported_once_and_with_its_last_output() -> None:
    ends: list[str] = []
    rank = RemoteRank(3, 7, ends.append)
    rank.mark_ended("process ended with code 1", "on a: no memory")
    rank.mark_ended("the stream of a broke")
    assert ends == ["process ended with code 1: on a: no memory"]
    assert rank.last_output() == "on a: no memory"
    async with asyncio.timeout(60):
        await rank.fenced()


async def test_a_rank_that_waits_for_a_slot_ends_by_any_signal() -> None:
    rank = RemoteRank(3, 7, lambda how: None)
    rank.signal("SIGKILL")
    assert not rank.is_waiting
    async with asyncio.timeout(60):
        await rank.fenced()


async def test_a_rank_that_an_earlier_front_left_is_killed_once() -> None:
    here = slot(token="secret", incarnation=7)
    here.kill_orphan()
    here.kill_orphan()
    assert [order.signal for order in orders(here)] == [link_pb2.SignalRank(incarnation=7, name="SIGKILL")]


@pytest.mark.parametrize(("token", "incarnation"), [("", 0), ("", 7), ("secret", MAX_INCARNATION)])
async def test_what_no_front_can_have_started_is_no_orphan(token: str, incarnation: int) -> None:
    here = slot(token, incarnation)
    here.kill_orphan()
    assert orders(here) == []
