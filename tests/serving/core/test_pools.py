"""Two pools as one server: what is refused, and what status and forecasts say of both."""

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import serving.recovery.rendezvous
from planner.failures.certificate import ServiceLevels, Terms, certify
from planner.failures.certificate_file import certificate
from planner.failures.loss_model import SERVED_MEANS
from planner.failures.pool_losses import PoolLossModel
from planner.plan.deployment import Deployment, FaultTolerance
from planner.plan.pools import PooledDeployment, any_deployment
from serving.cli.tables import _ranges_of
from serving.config import Settings
from serving.core.pool_status import joint_forecasts, joint_status
from serving.core.pools import Pools
from serving.core.start import pool_ranks
from serving.errors import InvalidRequest, MoejaxError
from serving.protocol.events import EventKind
from serving.protocol.instructions import Instruction
from serving.protocol.status import LossCost, LossForecast, RankStatus, Status
from serving.recovery.certificate_watch import CertificateWatch
from simulation.hand_model import small_request
from tests.support.fake_backend import FakeBackend
from tests.support.fake_executor import FakeCoordinator
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine

FORECAST = LossForecast(
    kind="rank",
    name="0",
    ranks=(0,),
    survivable=True,
    reason="",
    prepared=True,
    requests_moved=1,
    tokens_recomputed=0,
    experts_loaded=0,
    stall_ms=50.0,
    moved_stall_ms=70.0,
    capacity=0.5,
    traffic_lost=0.0,
)
POOL = {"ranks": 2, "pages_per_rank": 40, "kv_replication": "memory"}
LOSS = LossCost(survivable=False, prepared=False, stall_ms=9.0, experts_to_load=0, traffic=1.0, measured=False)


def status(rank: int, **fields: Any) -> Status:
    ranks = (RankStatus(id=rank, pid=1, host="localhost", state="serving", loss=LOSS),)
    return dataclasses.replace(FakeBackend().status(), ranks=ranks, axes={"expert": 1}, **fields)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kv_replication", "off"),
        ("parity", 1),
        ("tensor", 2),
    ],
)
def test_a_setting_that_pools_cannot_have_is_refused_with_the_way_out(setting: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=r"Set (it|tensor) to .*collocated") as refused:
        Settings(arch="pd", prefill=2, decode=2, rank_tokens="file", **{setting: value})
    assert refused.value.param == setting


@pytest.mark.parametrize("sizes", [{"prefill": 0}, {"prefill": 4}, {"prefill": 3, "decode": 3, "ranks": 5}])
def test_each_pool_has_a_rank_and_together_they_have_all(sizes: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="each side needs one"):
        Settings(arch="pd", **sizes)


def test_sizes_of_pools_go_with_their_architecture_alone() -> None:
    with pytest.raises(InvalidRequest, match="Set arch to pd"):
        Settings(prefill=1, decode=3)


@pytest.mark.parametrize("sizes", [{"prefill": 1}, {"decode": 3}, {"prefill": 1, "decode": 3}])
def test_the_first_ranks_compute_prompts(sizes: dict[str, int]) -> None:
    settings = Settings(arch="pd", ranks=4, **sizes)
    assert pool_ranks(settings) == {"prefill": (0,), "decode": (1, 2, 3)}
    assert (settings.for_pool(3).ranks, settings.for_pool(3).arch) == (3, "collocated")


def test_one_status_has_the_ranks_of_both_pools_and_their_sums() -> None:
    moved = cast(Any, SimpleNamespace(sent=5, returned=1))
    both = joint_status(status(0, running=1, waiting=2), status(1, running=3, waiting=0), moved, (), ended=False)
    assert [(rank.id, rank.role) for rank in both.ranks] == [(0, "prefill"), (1, "decode")]
    assert (both.running, both.waiting, both.requests_sent, both.requests_returned) == (4, 2, 5, 1)
    assert [(pool.name, pool.running, pool.ranks) for pool in both.pools] == [("prefill", 1, 1), ("decode", 3, 1)]
    losses = [rank.loss for rank in both.ranks]
    assert all(loss is not None and loss.survivable for loss in losses), "the other pool does its work"
    assert losses[0] is not None
    assert losses[0].stall_ms == 0, "no decode stream waits for a prefill rank"


def test_a_loss_of_all_ranks_of_a_pool_is_survived_only_while_the_other_one_serves() -> None:
    last = dataclasses.replace(FORECAST, survivable=False, prepared=False, reason="none left")
    found = {"prefill": [FORECAST, last], "decode": [last]}
    prefill, alone, decode = joint_forecasts(found, ranks={"prefill": 1, "decode": 3}, take_over_ms=80.0)
    assert (prefill.kind, prefill.stall_ms, prefill.moved_stall_ms) == ("prefill_rank", 0.0, 70.0)
    assert prefill.capacity == (0.5 * 1 + 3) / 4, "its pool has half, the other three quarters of the ranks all"
    assert alone.survivable
    assert "decode pool" in alone.reason
    assert (alone.capacity, alone.moved_stall_ms) == (0.75, 80.0)
    assert (decode.kind, decode.survivable) == ("decode_rank", True)
    (decode,) = joint_forecasts({"prefill": [], "decode": [last]}, ranks={"prefill": 0, "decode": 1}, take_over_ms=80.0)
    assert not decode.survivable
    assert decode.reason == "none left"


def test_a_forecast_has_the_ends_of_its_figures_as_the_table_shows_them() -> None:
    ends = {"moved_stall_low_ms": 60.0, "moved_stall_high_ms": 90.0, "capacity_low": 0.25, "capacity_high": 0.75}
    ranged = dataclasses.replace(FORECAST, range_source="measured", **ends)
    last = dataclasses.replace(FORECAST, survivable=False, range_source="measured", capacity=0.0)
    found = {"prefill": [ranged, last], "decode": []}
    for forecast in joint_forecasts(found, ranks={"prefill": 2, "decode": 2}, take_over_ms=80.0):
        assert forecast.moved_stall_low_ms <= forecast.moved_stall_ms <= forecast.moved_stall_high_ms
        assert forecast.capacity_low <= forecast.capacity <= forecast.capacity_high
    one, all_of_them = joint_forecasts(found, ranks={"prefill": 2, "decode": 2}, take_over_ms=80.0)
    assert _ranges_of(one)[2] == "62-88%"
    assert _ranges_of(all_of_them)[1:] == ("80.0", "50%")


@contextlib.asynccontextmanager
async def two_pools(certificate: str | None = None, **changes: Any) -> AsyncIterator[Pools]:
    """A server of two pools on fake ranks, which serves."""
    settings = Settings(**{**vars(SETTINGS), **POOL, **changes})
    watch = CertificateWatch(dataclasses.replace(settings, certificate=certificate))
    prefill = Machine(settings)
    decode = Machine(settings, beside=prefill)
    both = (prefill, decode)
    for each in both:
        await each.failover.start()
    pools = Pools(prefill.loop, decode.loop, watch)
    pools.start()
    try:
        async with asyncio.timeout(LIMIT_S):
            yield pools
    finally:
        await pools.drain(0.0)
        for each in both:
            await each.failover.close()


async def read(pools: Pools, request_id: str) -> list[Any]:
    """The items of a request, and the error that it ended with."""
    items: list[Any] = []
    try:
        async for item in pools.stream(small_request(request_id, range(12), max_tokens=60)):
            items.append(item)
    except MoejaxError as error:
        items.append(error)
    return items


def test_the_decode_pool_restores_without_a_look_at_costs_while_prompts_go_to_the_other_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)

    async def play() -> list[bool]:
        async with two_pools(restart=False) as pools:
            restorations = [each.engine.restoration for each in pools.loops]
            seen = [each.prompts_go_elsewhere() for each in restorations]
            plan = pools.prefill.failover.plan
            for each in plan.ranks if plan else ():
                cast(Any, pools.prefill.engine.executor).kill(each.id)
            while pools.prefill.failover.plan is not None:
                await asyncio.sleep(0)
            return [*seen, *(each.prompts_go_elsewhere() for each in restorations)]

    assert asyncio.run(play()) == [False, True, False, False]


@pytest.mark.parametrize("which", [0, 1])
def test_a_loop_that_ends_by_itself_ends_every_request_once_and_the_server_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)

    def broken() -> None:
        raise ValueError("no such thing")

    async def play() -> None:
        async with two_pools() as pools:
            clients = [asyncio.create_task(read(pools, f"r{nth}")) for nth in range(3)]
            while len(pools.decode.engine.state.running) < 2:  # the third waits for its replica
                await asyncio.sleep(0)
            late = asyncio.create_task(read(pools, "late"))
            await asyncio.sleep(0)
            assert pools.status().ready
            monkeypatch.setattr(pools.loops[which].engine, "expire", broken)
            ended = await asyncio.gather(*clients, late)
            assert ["no such thing" in str(items[-1]) for items in ended] == [True] * 4
            assert not pools.status().ready
            for _ in range(20):
                await asyncio.sleep(0.001)
            status = pools.status()
            assert (status.running, status.waiting) == (0, 0), "requests without a reader run on"
            assert (status.failed, status.finished) == (4, 0)

    asyncio.run(play())


def test_operations_are_about_ranks_of_one_pool_and_a_drain_is_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)

    async def play() -> collections.Counter[str]:
        async with two_pools() as pools:
            for action in ("scale_up", "scale_down", "drain"):
                with pytest.raises(InvalidRequest, match="Give the numbers of ranks") as refused:
                    await pools.apply(Instruction(action=action))
                assert refused.value.param == "ranks"
        return collections.Counter(str(event.kind) for event in pools.prefill.events.retained())

    assert asyncio.run(play())[EventKind.DRAINING] == 1


async def settled(pools: Pools, state: str) -> Status:
    """The status once its certificate has this state."""
    while (status := pools.status()).certificate != state:
        await asyncio.sleep(0.001)
    return status


def certified(d: PooledDeployment) -> str:
    """A certificate of the plan: any rank may be lost, and roles do not switch for it."""
    losses = PoolLossModel(d, means=[means for means in SERVED_MEANS if means not in ("regrow", "mask", "switch")])
    terms = Terms(survive=FaultTolerance(ranks=1), levels=ServiceLevels(stall_ms=1e6), requests=2)
    verdict = certify(losses, terms)
    assert verdict.holds
    return certificate(losses, terms, verdict, one_front=True).to_json()


def test_the_plan_of_both_pools_is_certified_and_the_status_says_whether_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)
    file = tmp_path / "certificate.json"

    async def play() -> None:
        async with two_pools() as pools:
            assert pools.status().certificate == ""
            d = any_deployment(cast(Any, pools.deployment()).to_json())
            assert isinstance(d, PooledDeployment)
            assert [pool.work for pool in d.pools().values()] == ["prompts", "decode"]
            assert [pool.plan.rank_ids for pool in d.pools().values()] == [(0, 1), (2, 3)]
            assert d.figure("requests_per_second") > 0
            file.write_text(certified(d))
        async with two_pools(str(file), restart=False) as pools:
            await settled(pools, "holds")
            for loop, rank in ((pools.decode, 3), (pools.prefill, 0)):
                await loop.apply(Instruction(action="scale_down", ranks=(rank,)))
                broken = await settled(pools, "does not hold")
                assert "roles do not switch" in broken.certificate_reason
                assert broken.certificate_repair == f"rank {rank} back"
                await loop.apply(Instruction(action="scale_up", ranks=(rank,)))
                whole = await settled(pools, "holds")
                assert (whole.certificate_reason, whole.certificate_repair) == ("", "")

    asyncio.run(play())


def test_the_plan_in_force_is_that_of_the_pool_which_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)

    async def play() -> None:
        async with two_pools(restart=False) as pools:
            monkeypatch.setattr(pools.decode, "deployment", lambda: None)
            found = pools.deployment()
            assert isinstance(found, Deployment)
            assert (found.work, found.plan.rank_ids) == ("all", (0, 1))

    asyncio.run(play())
