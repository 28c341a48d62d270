"""A keeper's rank outlives the front: the next one is told of it, and without one it is ended."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import serving.keeper
from serving.dial import Way
from serving.health import HealthSettings
from serving.keeper import Keeper, Offer
from serving.links import RankLinks
from serving.places import Places
from serving.prepared import Prepared
from serving.proto.moejax.v1 import link_pb2
from serving.rank_listener import RankListener
from tests.e2e.joining import free_address
from tests.serving.test_places import OURS, until

pytestmark = pytest.mark.anyio


class Front:
    """A front at an address, whose hosts need no token; it ends without a word to them."""

    def __init__(self, address: str) -> None:
        self.places = Places(OURS, link_pb2.PrepareModel(model="tiny"), lambda secret, now: None)
        self.links = RankLinks(HealthSettings(heartbeat_floor_s=60, step_floor_s=60), lambda loss: None, self.places)
        self._listener = RankListener(address=address, places=self.places)

    async def __aenter__(self) -> "Front":
        await self.links.open(self._listener)
        await self.places.gather(1, "here", 20, lambda _: None)
        self.inherited = self.links.inherit()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self.links._server is not None
        assert self.links._watcher is not None
        self.links._watcher.cancel()
        await self.links._server.stop(0)

    async def pid(self) -> int:
        """Of rank 0, which runs, once its keeper has said so."""
        await until(lambda: (each := self.links.get(0)) is not None and each.process.pid is not None)
        each = self.links.get(0)
        assert each is not None
        assert each.process.pid is not None
        return each.process.pid


@pytest.fixture
async def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """Where the front of a keeper is, whose host has the model already."""

    async def prepare(model: str, weights: str = "", *, in_place: bool = False, dense: str = "") -> Prepared:
        return serving.keeper.dataclasses.replace(OURS, executables=str(tmp_path / "executables"))

    monkeypatch.setattr(serving.keeper, "prepare", prepare)
    monkeypatch.setattr(serving.keeper, "PAUSE_S", 0.05)
    where = free_address()
    keeper = Keeper(Way(front=where, address="127.0.0.1"), Offer(secret="", host="a"), lambda text: None)
    running = asyncio.create_task(keeper.run())
    yield where
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert keeper._kept is None


def is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


async def test_the_next_front_is_told_of_the_rank_that_runs_here(address):
    async with Front(address) as front:
        assert front.inherited == ()
        front.links.spawn(0)
        pid = await front.pid()
    for _ in range(2):
        async with Front(address) as front:
            assert front.inherited == (0,)
            assert await front.pid() == pid
    async with Front(address) as front:
        await front.links.close()
        assert not is_there(pid), "a front that ends in order ends its ranks"


async def test_a_rank_that_no_front_comes_for_is_ended(address, monkeypatch):
    monkeypatch.setattr(serving.keeper, "FORGOTTEN_S", 2.0)
    async with Front(address) as front:
        front.links.spawn(0)
        pid = await front.pid()
    assert is_there(pid)
    await until(lambda: not is_there(pid))
    async with Front(address) as front:
        assert front.inherited == ()


async def test_a_rank_that_ended_while_no_front_was_there_is_not_told_of(address):
    async with Front(address) as front:
        front.links.spawn(0)
        pid = await front.pid()
    os.kill(pid, 9)
    await until(lambda: not is_there(pid))
    async with Front(address) as front:
        assert front.inherited == ()
        (place,) = front.places.free
        kept = front.links.spawn(0).process
        await front.pid()
        place.orders.put_nowait(link_pb2.PlaceOrder(signal=link_pb2.SignalRank(incarnation=10**6, name="SIGKILL")))
        kept.incarnation = 10**6
        await until(lambda: place.rank is None)  # told that what it was to end has ended
