"""A server's certificate: its terms on the plan in force, and the ranks that restore it, as the status shows them."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from planner import solve
from planner.failures.certificate import ServiceLevels, Terms, certify
from planner.failures.certificate_file import certificate
from planner.failures.loss_model import SERVED_MEANS, LossModel
from planner.inputs.cluster import Cluster
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment, FaultTolerance
from planner.plan.plan import Plan
from serving.app import App
from serving.config import Settings
from serving.errors import InvalidRequest
from serving.protocol.instructions import Instruction
from serving.protocol.status import Status
from serving.recovery.certificate_watch import CertificateWatch, InForce, check, read_signed
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine

MODEL = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1 << 20, rest_bytes=1 << 20, layers=4)
MEANS = tuple(means for means in SERVED_MEANS if means not in ("regrow", "mask"))
CLUSTER = Cluster.local(6)
BASE = solve(MODEL, CLUSTER, slots_per_rank=2)
"""Six ranks with 12 slots for 8 experts: any two may be lost, a third not."""


def plan_of(alive) -> Plan:
    return BASE if set(alive) == set(BASE.rank_ids) else solve(MODEL, CLUSTER, alive=alive, previous=BASE)


def deployment(*lost: int) -> Deployment:
    plan = plan_of([rank for rank in BASE.rank_ids if rank not in lost])
    return Deployment(plan=plan, workload=MODEL, cluster=CLUSTER)


def in_force(*lost: int) -> InForce:
    """The plan without these ranks, as a server has it."""
    now = deployment(*lost)
    return InForce(
        deployment=now, lost=lost, with_back=lambda back: replace(now, plan=plan_of((*now.plan.rank_ids, *back)))
    )


def made(d: Deployment, ranks: int = 1, stall_ms: float = 1e6, means=MEANS):
    losses = LossModel(d, means=means)
    terms = Terms(survive=FaultTolerance(ranks=ranks), levels=ServiceLevels(stall_ms=stall_ms), requests=8)
    return certificate(losses, terms, certify(losses, terms), one_front=True)


@pytest.mark.parametrize("lost", [(), (1,), (1, 4), (0, 5)])
def test_it_holds_while_the_ranks_left_can_lose_what_it_names(lost):
    found = check(made(deployment()), in_force(*lost))
    assert (found.state == "holds") == (len(lost) + 1 <= 2)
    if found.state != "holds":
        assert "8 experts do not fit in 6 slots" in found.reason


@pytest.mark.parametrize(("ranks", "lost"), [(1, (1, 4)), (2, (3,)), (2, (0, 5))])
def test_it_holds_again_with_the_ranks_that_the_repair_names_and_with_no_fewer(ranks, lost):
    certified = made(deployment(), ranks)
    found = check(certified, in_force(*lost))
    assert found.state == "does not hold"
    words = found.repair.removesuffix(" back").removeprefix("ranks ").removeprefix("rank ")
    back = {int(rank) for rank in words.split(", ")}
    assert check(certified, in_force(*(set(lost) - back))).state == "holds"
    assert len(back) == len(lost) - (2 - ranks)


def test_another_model_or_levels_that_were_never_kept_have_no_repair():
    other = replace(in_force(), deployment=replace(deployment(), workload=replace(MODEL, heads=4)))
    assert check(made(deployment()), other).reason == "it is of another model"
    found = check(made(deployment(), stall_ms=1.0), in_force(1))
    assert (found.state, found.repair) == ("does not hold", "")
    assert "stall_ms" in found.reason


def test_a_certificate_that_cannot_be_trusted_stops_the_start_and_does_not_hold_for_a_front_that_takes_over(tmp_path):
    file, key = tmp_path / "certificate.json", tmp_path / "key"
    key.write_text("0123456789abcdef")
    file.write_text(made(deployment()).to_json())
    settings = Settings(model="tiny", certificate=str(file))
    assert read_signed(settings) == made(deployment())
    assert read_signed(Settings(model="tiny")) is None
    with pytest.raises(InvalidRequest, match="is not signed"):
        read_signed(replace(settings, certificate_key=str(key)))
    file.write_text("{}")
    with pytest.raises(InvalidRequest, match="no certificate"):
        read_signed(settings)
    with pytest.raises(InvalidRequest, match="no certificate"):
        asyncio.run(App.start(settings))
    found = CertificateWatch(settings).state(1, in_force)
    assert found.state == "does not hold"
    assert "no certificate" in found.reason


async def settled(m: Machine, state: str) -> Status:
    """The status once its certificate has this state."""
    async with asyncio.timeout(LIMIT_S):
        while (status := m.loop.status()).certificate != state:
            await asyncio.sleep(0.001)
    return status


def test_the_status_of_a_server_shows_it_through_a_loss_and_its_repair(tmp_path: Path):
    file = tmp_path / "certificate.json"

    async def run() -> None:
        m = Machine(replace(SETTINGS, restart=False))
        await m.failover.start()
        d = m.loop.deployment()
        assert d is not None
        file.write_text(made(Deployment.from_json(d.to_json())).to_json())
        assert m.loop.status().certificate == ""
        await m.failover.close()

        m = Machine(replace(SETTINGS, restart=False, certificate=str(file)))
        await m.failover.start()
        m.loop.start()
        clients = [asyncio.create_task(m.read(request)) for request in m.requests]
        try:
            assert m.loop.status().certificate == "checking"
            await settled(m, "holds")
            await m.begun()
            m.executor.kill(1)
            broken = await settled(m, "does not hold")
            assert "do not fit in" in broken.certificate_reason
            assert broken.certificate_repair == "rank 1 back"
            await m.loop.apply(Instruction(action="scale_up", ranks=(1,)))
            whole = await settled(m, "holds")
            assert (whole.certificate_reason, whole.certificate_repair) == ("", "")
            await asyncio.gather(*clients)
        finally:
            await m.loop.drain(0.0)
            await m.failover.close()

    asyncio.run(run())
