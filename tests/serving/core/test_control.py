"""Instructions are checked before anything is done to a rank."""

import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import solve
from planner.inputs.cluster import Cluster
from planner.inputs.workload import Workload
from planner.plan.plan import Plan
from serving.config import SecuritySettings
from serving.core.control import Control, hottest_slot
from serving.errors import NotPermitted, UnknownRequest
from serving.protocol.instructions import DeviceError
from tests.support.fake_backend import FakeBackend

pytestmark = pytest.mark.anyio


class Executor:
    """Records what is sent to ranks."""

    def __init__(self) -> None:
        self.signals: list[tuple[int, str]] = []

    def signal(self, rank: int, signal: str) -> None:
        self.signals.append((rank, signal))

    def cut_links(self, rank: int) -> None:
        self.signals.append((rank, "cut"))


def control(executor: Executor, *, chaos: bool = True, plan: Plan | None = None) -> Control:
    """Of three ranks on two hosts: 0 and 1 on a, 2 on b."""
    hosts = {0: "a", 1: "a", 2: "b"}
    plans = types.SimpleNamespace(
        device_of=lambda rank: types.SimpleNamespace(host=hosts[rank]),
        base=types.SimpleNamespace(rank_ids=tuple(hosts)),
    )
    failover: Any = types.SimpleNamespace(plan_ranks=tuple(hosts), plans=plans, plan=plan)
    maintenance: Any = types.SimpleNamespace(report=lambda error: error)
    rebalancing: Any = None
    given: Any = executor
    return Control(SecuritySettings(chaos=chaos), FakeBackend().model, given, failover, maintenance, rebalancing)


async def test_a_host_is_killed_with_all_its_ranks():
    executor = Executor()
    await control(executor).kill(0, "SIGKILL", "a")
    assert executor.signals == [(0, "SIGKILL"), (1, "SIGKILL")]
    await control(executor).kill(2, "SIGSTOP", "")
    assert executor.signals[-1] == (2, "SIGSTOP")
    await control(executor).kill(1, "LINKS", "")
    assert executor.signals[-1] == (1, "cut")


@pytest.mark.parametrize(
    ("rank", "signal", "host", "message"),
    [
        (3, "SIGKILL", "", r"rank 3 is not alive; the ranks alive are \[0, 1, 2\]"),
        (0, "SIGKILL", "c", "c is not alive"),
        (0, "SIGHUP", "", "signal 'SIGHUP' is none of SIGKILL, SIGSTOP, NAN, BITFLIP, LINKS"),
    ],
)
async def test_what_is_not_there_cannot_be_killed(rank, signal, host, message):
    executor = Executor()
    with pytest.raises(UnknownRequest, match=message):
        await control(executor).kill(rank, signal, host)
    assert executor.signals == []


async def test_nobody_kills_without_chaos():
    executor = Executor()
    with pytest.raises(NotPermitted, match="--chaos"):
        await control(executor, chaos=False).kill(0, "SIGKILL", "")
    assert executor.signals == []


async def test_weights_are_not_damaged_while_no_plan_is_in_force():
    executor = Executor()
    await control(executor).kill(0, "NAN", "")
    assert executor.signals == []


async def test_an_error_of_a_rank_that_is_not_there_is_refused():
    error = DeviceError(rank=7, level=3)
    with pytest.raises(UnknownRequest, match=r"there is no rank 7; ranks are \[0, 1, 2\]"):
        control(Executor()).report(error)


def placed(ranks: int, layers: int, experts: int, spare: int) -> Plan:
    """A plan with room for all experts after the loss of a rank."""
    work = Workload(name="w", layers=layers, moe_layers=layers, experts=experts, experts_per_token=1, expert_bytes=8)
    return solve(work, Cluster.local(ranks), slots_per_rank=-(-experts // (ranks - 1)) + spare, pages_per_rank=4)


@given(st.tuples(st.integers(2, 5), st.integers(1, 3), st.integers(2, 8)), st.integers(0, 3))
def test_the_hottest_slot_is_one_that_somebody_sends_tokens_to(sizes, spare):
    plan = placed(*sizes, spare)
    routes = plan.expert_to_slot()
    for place, rank in enumerate(plan.expert_rank_ids):
        layer, slot = hottest_slot(plan, rank, np.ones((sizes[1], sizes[2])))
        used = routes[:, layer] == place * plan.slots_per_rank + slot
        here = (routes // plan.slots_per_rank == place).any()
        assert used.any() or not here


def test_the_hottest_slot_is_the_one_whose_expert_had_most_traffic():
    before = placed(2, 2, 4, 0)
    loads = np.zeros((2, 4))
    loads[1, before.slots_of(1)[1, 2]] = 5
    assert hottest_slot(before, 1, loads) == (1, 2)
