"""Two pools as one server: what is refused, and what status and forecasts say of both."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serving.config import Settings
from serving.core.pool_status import joint_forecasts, joint_status
from serving.core.start import pool_ranks
from serving.errors import InvalidRequest
from serving.protocol.status import LossCost, LossForecast, RankStatus, Status
from tests.support.fake_backend import FakeBackend

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
LOSS = LossCost(survivable=False, prepared=False, stall_ms=9.0, experts_to_load=0, traffic=1.0, measured=False)


def status(rank: int, **fields: Any) -> Status:
    ranks = (RankStatus(id=rank, pid=1, host="localhost", state="serving", loss=LOSS),)
    return dataclasses.replace(FakeBackend().status(), ranks=ranks, axes={"expert": 1}, **fields)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("launcher", "join"),
        ("kv_replication", "off"),
        ("kv_replication", "stream"),
        ("parity", 1),
        ("certificate", "file"),
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
    both = joint_status(status(0, running=1, waiting=2), status(1, running=3, waiting=0), moved, ())
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
    assert alone.survivable
    assert "decode pool" in alone.reason
    assert (alone.capacity, alone.moved_stall_ms) == (0.75, 80.0)
    assert (decode.kind, decode.survivable) == ("decode_rank", True)
    (decode,) = joint_forecasts({"prefill": [], "decode": [last]}, ranks={"prefill": 0, "decode": 1}, take_over_ms=80.0)
    assert not decode.survivable
    assert decode.reason == "none left"
