"""The front's part in an upgrade, with the real loop and failover on ranks without processes."""

import asyncio
import dataclasses
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serving import app
from serving.core import upgrades as module
from serving.core.upgrades import Upgrades
from serving.errors import Conflict, Internal
from serving.launch.code import Code
from serving.launch.run_folder import RunFolder
from serving.launch.upgrade_record import FILE, UpgradeRecord, UpgradeStage, UpgradeState
from serving.protocol.events import EventKind
from serving.protocol.instructions import Action, Instruction
from serving.recovery.membership_events import TakenOut
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine

pytestmark = pytest.mark.usefixtures("no_processes")

NEW = dataclasses.replace(Code.own(), build="new", path="/new", root="/new")


def write(folder: Path, state: UpgradeState, stage: UpgradeStage) -> UpgradeRecord:
    record = UpgradeRecord(code=NEW, origin=Code.own(), number=1, state=state, stage=stage)
    record.save(folder)
    return record


def on_a_server(act: Callable[[Machine, Upgrades], Awaitable[None]], folder: Path) -> Machine:
    """A server of three ranks, all of which serve and whose every loss is prepared for, until `act` returns."""

    async def play() -> Machine:
        m = Machine(SETTINGS)
        await m.failover.start()
        m.loop.start()
        try:
            async with asyncio.timeout(LIMIT_S):
                upgrades = Upgrades(m.loop.engine, RunFolder(folder))
                while not upgrades._prepared():
                    await asyncio.sleep(0.001)
                await act(m, upgrades)
        finally:
            await m.loop.drain(0.0)
        return m

    return asyncio.run(play())


def returning(value: Any) -> Callable[..., Awaitable[Any]]:
    """A coroutine function that returns a value."""

    async def give(*_: Any) -> Any:
        return value

    return give


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The reports of fronts to the supervisor."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "request_supervisor", lambda folder, upgrade: said.append(upgrade) or {})
    return said


@pytest.mark.parametrize("action", ["pause", "drain", "scale_down", "scale_up", "rebalance", "weights"])
def test_other_instructions_are_refused_while_processes_are_replaced(action: Action, tmp_path: Path) -> None:
    write(tmp_path, "running", "ranks")

    async def act(m: Machine, upgrades: Upgrades) -> None:
        m.loop.upgrades = upgrades
        model = {"model": "fake"} if action == "weights" else {}
        with pytest.raises(Conflict, match="an upgrade is under way"):
            await m.loop.apply(Instruction(action=action, **model))

    on_a_server(act, tmp_path)


def test_a_server_that_is_paused_is_not_upgraded(tmp_path: Path) -> None:
    async def act(m: Machine, upgrades: Upgrades) -> None:
        m.loop.engine.maintenance.paused = True
        with pytest.raises(Conflict, match="paused"):
            await upgrades.begin(Instruction(action="upgrade", path="/new"))

    on_a_server(act, tmp_path)


def test_a_rank_leaves_only_while_all_others_serve(tmp_path: Path) -> None:
    async def act(m: Machine, upgrades: Upgrades) -> None:
        assert upgrades._may_leave(0)
        m.executor.kill(1)
        m.failover.preparation.coverage = dict  # as a rank that is left alone has it
        while 1 in m.failover.plan_ranks:
            assert not upgrades._may_leave(0)
            await asyncio.sleep(0)
        assert not upgrades._may_leave(0), "rank 1 is not back"

    on_a_server(act, tmp_path)


def test_a_rank_that_is_out_is_neither_asked_for_nor_replaced(tmp_path: Path) -> None:
    async def act(m: Machine, upgrades: Upgrades) -> None:
        m.failover.state.record(TakenOut(2))
        m.executor.kill(2)
        while 2 in m.failover.plan_ranks:
            await asyncio.sleep(0.001)
        upgrades._check_ranks()
        assert await upgrades._replace(2, write(tmp_path, "running", "ranks")) == ""
        upgrades._take(UpgradeRecord.load(tmp_path))
        assert await upgrades._replace(2, write(tmp_path, "running", "ranks")) == ""
        assert not m.failover.membership.is_incoming(2)

    on_a_server(act, tmp_path)


def test_fronts_on_the_way_back_say_once_that_the_upgrade_has_failed(tmp_path: Path) -> None:
    async def act(m: Machine, upgrades: Upgrades) -> None:
        write(tmp_path, "rolling_back", "front")
        for _ in range(3):
            Upgrades(m.loop.engine, RunFolder(tmp_path))

    kinds = [event.kind for event in on_a_server(act, tmp_path).loop.events.retained()]
    assert kinds.count(EventKind.UPGRADE_FAILED) == 1


def test_a_record_that_cannot_be_read_does_not_end_the_following(
    tmp_path: Path, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)

    async def act(m: Machine, upgrades: Upgrades) -> None:
        (tmp_path / FILE).write_text("{")
        following = asyncio.create_task(upgrades.follow())
        await asyncio.sleep(0.1)
        record = write(tmp_path, "running", "edges")
        while upgrades.record != record:
            assert not following.done()
            await asyncio.sleep(0.001)
        following.cancel()

    on_a_server(act, tmp_path)


def test_a_record_that_was_read_before_the_upgrade_began_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, reading, go_on = write(tmp_path, "done", ""), threading.Event(), threading.Event()
    load = UpgradeRecord.load

    def slow(folder: Path) -> UpgradeRecord | None:
        if threading.current_thread() is not threading.main_thread() and not go_on.is_set():
            found = load(folder)
            reading.set()
            go_on.wait(LIMIT_S)
            return found
        return load(folder)

    def begin(folder: Path, upgrade: dict[str, Any]) -> dict[str, Any]:
        del upgrade
        dataclasses.replace(old, number=2, state="running", stage="front").save(folder)
        return {}

    async def act(m: Machine, upgrades: Upgrades) -> None:
        monkeypatch.setattr(module, "request_supervisor", begin)
        monkeypatch.setattr(upgrades, "_code_of", returning(NEW))
        monkeypatch.setattr(upgrades, "_record_answers", returning(None))
        following = asyncio.create_task(upgrades.follow())
        await asyncio.to_thread(reading.wait, LIMIT_S)
        try:
            await upgrades.begin(Instruction(action="upgrade", path="/new"))
        finally:
            go_on.set()
        assert upgrades.record is not None
        states = {upgrades.record.state}
        for _ in range(100):
            await asyncio.sleep(0.001)
            states.add(upgrades.record.state)
        following.cancel()
        assert states == {"running"}

    monkeypatch.setattr(UpgradeRecord, "load", slow)
    on_a_server(act, tmp_path)


def test_a_front_whose_canaries_are_wrong_reports_it_and_ends_the_ranks_that_nobody_has_tried(
    tmp_path: Path, reports: list[dict[str, Any]]
) -> None:
    write(tmp_path, "running", "ranks")

    async def act(m: Machine, upgrades: Upgrades) -> None:
        upgrades._build_of = lambda rank: "new" if rank == 1 else Code.own().build
        m.loop.engine.canary.on_failed(frozenset(), "on rank 1 the canaries have other tokens")
        assert set(m.failover.membership.losses) == {1}

    on_a_server(act, tmp_path)
    assert reports == [{"failed": "on rank 1 the canaries have other tokens", "number": 1}]


def test_a_canary_that_is_ended_with_an_error_ends_the_trial(tmp_path: Path) -> None:
    async def act(m: Machine, upgrades: Upgrades) -> None:
        engine = m.loop.engine
        verdict = engine.canary.begin()
        engine.fail_request(next(iter(engine.state.canaries)), Internal("it was convicted"))
        assert "it was convicted" in await verdict
        assert not engine.canary.busy

    on_a_server(act, tmp_path)


@pytest.mark.parametrize(("state", "stage"), [("running", "ranks"), ("running", "edges"), ("rolling_back", "front")])
def test_a_front_that_cannot_start_in_an_upgrade_leaves_the_ranks_to_the_next_one(
    state: UpgradeState, stage: UpgradeStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, state, stage)

    def leave(code: int) -> None:
        raise SystemExit(code)

    async def start() -> None:
        async with app._ends_at_once_in_an_upgrade(RunFolder(tmp_path)):
            raise Internal("it cannot start")

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        asyncio.run(start())
