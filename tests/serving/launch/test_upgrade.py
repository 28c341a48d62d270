"""The stages of an upgrade as the supervisor carries them out: each process is replaced once the one before it serves,
and whatever fails leads back to the former code."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.launch.code import Code
from serving.launch.forkserver import Forkserver
from serving.launch.run_folder import RunFolder
from serving.launch.standby import Standby
from serving.launch.upgrade import Upgrade
from serving.launch.upgrade_record import UpgradeRecord
from serving.protocol.versions import VersionRange

OLD = Code.own()
NEW = dataclasses.replace(OLD, build="new", path="/new", root="/new")


class Front:
    """The process of a front."""

    def __init__(self, pid: int) -> None:
        self.pid, self.killed = pid, False

    def kill(self) -> None:
        self.killed = True


class HandStandby(Standby):
    """A standby front that is ready, or has ended, when the test says so."""

    ready, ended = False, None

    def prepare(self) -> None:
        """Start nothing."""

    def use(self, code: Code) -> None:
        self.code, self.ready, self.ended = code, False, None

    @property
    def waiting(self) -> bool:
        return self.ready

    @property
    def exit_code(self) -> int | None:
        return self.ended


class Edges:
    """Two edges, one of which is replaced with each call."""

    def __init__(self) -> None:
        self.builds = [OLD.build, OLD.build]
        self.successor_failed = ""
        self.successor_started_at: float | None = None
        self.dropped = 0

    def replace_next(self, code: Code, drain_s: float) -> bool:
        old = next((place for place, each in enumerate(self.builds) if each != code.build), None)
        if old is not None:
            self.builds[old] = code.build
        return old is not None

    def drop_successor(self) -> None:
        """Note that it was asked for."""
        self.dropped += 1
        self.successor_started_at = None


class Server:
    """A supervisor by hand."""

    def __init__(self, folder: Path) -> None:
        self.run = RunFolder(folder)
        unused = Forkserver()
        self.standby, self.edges, self.ranks = HandStandby(self.run, unused), Edges(), HandStandby(self.run, unused)
        self.upgrade = Upgrade(self.run, self.standby, self.edges, self.ranks, start_s=60.0)
        self.front, self.pids = Front(1), 1
        self.build = OLD.build
        self.serves()

    def serves(self) -> None:
        (self.run.path / f"ready-{self.front.pid}").touch()

    def step(self) -> None:
        """One pass of the supervisor's loop; a front that was killed is followed by the standby."""
        self.upgrade.step(self.front)
        if self.front.killed:
            self.ends(-9)

    def ends(self, code: int) -> None:
        assert self.upgrade.on_front_ended(self.front, code), "no other front would follow"
        self.follow()

    def follow(self) -> None:
        self.pids += 1
        self.front, self.build = Front(self.pids), self.standby.code.build
        self.upgrade.on_front_started()

    def dies(self) -> None:
        """The front that serves dies of itself, and the next one is started."""
        assert not self.upgrade.on_front_ended(self.front, -11)  # type: ignore[arg-type] - as much as is needed
        self.follow()

    def begin(self) -> None:
        assert self.upgrade.answer({"begin": NEW.to_json(), "drain_s": 1.0}) == {}

    def front_is_replaced(self) -> None:
        self.step()
        self.standby.ready = True
        self.step()
        self.serves()
        self.step()

    def edges_are_replaced(self) -> None:
        for _ in range(3):
            self.step()

    def reports(self, **report: object) -> None:
        record = self.record
        self.upgrade.answer({"number": record.number, "state": record.state, **report})

    @property
    def record(self) -> UpgradeRecord:
        found = UpgradeRecord.load(self.run.path)
        assert found is not None
        return found

    def is_back(self) -> None:
        """On the way back, all of it ends with the former code."""
        for _ in range(8):
            if self.record.stage == "ranks":
                break
            self.standby.ready = True
            self.step()
            self.serves()
        assert (self.build, set(self.edges.builds), self.ranks.code) == (OLD.build, {OLD.build}, OLD)
        self.reports()
        assert (self.record.state, self.record.rolled_back, self.record.done) == ("rolled_back", 1, 0)
        assert self.standby.code == OLD


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_front_edges_and_ranks_are_replaced_in_turn_and_started_with_the_new_code_from_then_on(server: Server) -> None:
    server.begin()
    assert server.record.stage == "front"
    server.step()
    assert not server.front.killed, "nobody stands by"
    server.standby.ready = True
    server.step()
    assert (server.build, server.record.stage) == ("new", "front")
    server.step()
    assert server.record.stage == "front", "the new front does not serve yet"
    server.serves()
    server.step()
    assert (server.record.stage, server.ranks.code) == ("edges", OLD)
    server.edges_are_replaced()
    assert (server.record.stage, server.ranks.code) == ("ranks", NEW)
    server.reports()
    assert (server.record.state, server.record.done) == ("done", 1)
    assert (server.standby.code, set(server.edges.builds)) == (NEW, {"new"})
    assert not server.upgrade.active


def test_code_that_the_supervisor_cannot_run_is_refused_with_both_numbers(server: Server) -> None:
    protocols = {**NEW.protocols, "supervisor": VersionRange(7, 8)}
    refused = server.upgrade.answer({"begin": dataclasses.replace(NEW, protocols=protocols).to_json(), "drain_s": 1.0})
    assert "version 7 to 8 of the supervisor protocol" in refused["refused"]
    assert not server.upgrade.active


def test_records_of_another_version_are_read_as_far_as_their_fields_are_known(server: Server) -> None:
    server.begin()
    value = server.record.to_json()
    assert UpgradeRecord.from_json({**value, "code": {**value["code"], "later": 1}, "later": 1}) == server.record


def test_a_second_upgrade_is_refused_while_one_is_under_way(server: Server) -> None:
    server.begin()
    assert "under way" in server.upgrade.answer({"begin": NEW.to_json(), "drain_s": 1.0})["refused"]


def fails_before_it_stands_by(server: Server) -> None:
    server.step()
    server.standby.ended = 1
    server.step()


def fails_before_it_serves(server: Server) -> None:
    server.step()
    server.standby.ready = True
    server.step()
    server.ends(1)


def has_an_edge_that_fails(server: Server) -> None:
    server.front_is_replaced()
    server.step()
    server.edges.successor_failed = "it ended"
    server.step()


def has_ranks_that_fail(server: Server) -> None:
    server.front_is_replaced()
    server.edges_are_replaced()
    server.reports(failed="rank 1 answers otherwise")


def does_not_serve_after_a_death_while_edges_are_replaced(server: Server) -> None:
    server.front_is_replaced()
    assert server.record.stage == "edges"
    server.dies()
    server.ends(1)


def does_not_serve_in_time_after_a_death_while_ranks_are_replaced(server: Server) -> None:
    server.front_is_replaced()
    server.edges_are_replaced()
    server.dies()
    server.upgrade._front_deadline = 0.0
    server.step()


def dies_again_and_again(server: Server) -> None:
    server.front_is_replaced()
    server.edges_are_replaced()
    server.dies()
    server.serves()
    server.ends(-11)


def has_an_edge_that_is_late(server: Server) -> None:
    server.front_is_replaced()
    server.edges.successor_started_at = time.monotonic() - 61.0
    server.step()
    assert server.edges.dropped


def is_late(server: Server) -> None:
    server.upgrade._deadline = 0.0
    server.step()
    server.step()


@pytest.mark.parametrize(
    "fails",
    [
        fails_before_it_stands_by,
        fails_before_it_serves,
        has_an_edge_that_fails,
        has_an_edge_that_is_late,
        has_ranks_that_fail,
        does_not_serve_after_a_death_while_edges_are_replaced,
        does_not_serve_in_time_after_a_death_while_ranks_are_replaced,
        dies_again_and_again,
        is_late,
    ],
    ids=lambda each: each.__name__,
)
def test_whatever_fails_leads_back_to_the_former_code(server: Server, fails: Callable[[Server], None]) -> None:
    server.begin()
    fails(server)
    record = server.record
    assert (record.state, record.code, record.origin.build) == ("rolling_back", OLD, "new")
    assert record.cause
    assert server.ranks.code == OLD
    server.is_back()


def test_edges_that_drain_for_long_are_not_late(server: Server) -> None:
    server.begin()
    server.front_is_replaced()
    server.upgrade._deadline = 0.0
    server.edges.successor_started_at = time.monotonic() - 30.0
    server.step()
    assert server.record.state == "running"


def test_on_the_way_back_whatever_does_not_start_is_tried_again(server: Server) -> None:
    server.begin()
    fails_before_it_serves(server)
    pauses = []
    for _ in range(8):
        server.ends(1)
        pauses.append(server.upgrade.pause_s)
    assert pauses[0] <= 1.0
    assert sorted(pauses) == pauses
    assert 1.0 < pauses[-1] <= 5.0
    server.upgrade._front_deadline = 0.0
    server.step()
    server.serves()
    server.edges.successor_started_at = time.monotonic() - 61.0
    server.is_back()


def test_a_standby_that_ends_on_the_way_back_is_started_again(server: Server) -> None:
    server.begin()
    server.front_is_replaced()
    server.edges.successor_failed = "it ended"
    server.step()
    server.standby.ended = 1
    server.step()
    assert server.standby.ended is None
    server.is_back()


def test_a_front_that_dies_of_itself_is_no_part_of_the_upgrade(server: Server) -> None:
    assert not server.upgrade.on_front_ended(server.front, -9)  # type: ignore[arg-type] - as much as is needed
    server.begin()
    server.front_is_replaced()
    assert not server.upgrade.on_front_ended(server.front, -11)  # type: ignore[arg-type]
    assert server.record.state == "running", "the next front goes on"


def test_reports_of_an_earlier_upgrade_or_of_another_direction_change_nothing(server: Server) -> None:
    server.begin()
    server.front_is_replaced()
    server.edges_are_replaced()
    before = server.record
    server.upgrade.answer({"number": before.number - 1, "failed": "late"})
    server.upgrade.answer({"number": before.number, "state": "rolling_back"})
    assert server.record == before
