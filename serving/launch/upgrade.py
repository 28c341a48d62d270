"""The upgrade of a running server to other code, as its supervisor carries it out (docs/decisions/0026).

Three stages, each of which the next one waits for: the front hands over to one that runs the new code, edges are
replaced one after the other, and the front has ranks replaced one after the other. Whatever of the new code cannot
start, or does not answer as the old one did, is not used; the server goes back to the old code by the same stages.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

from serving.launch.child import ChildHandle
from serving.launch.code import Code
from serving.launch.run_folder import RunFolder
from serving.launch.standby import Standby
from serving.launch.upgrade_record import UpgradeRecord, UpgradeStage
from serving.protocol.versions import PROTOCOLS

POLL_S = 0.05
"""Seconds between two parts of an upgrade."""
MAX_FRONT_DEATHS = 2
"""Deaths of fronts that run the new code and have served, after which it is rolled back."""
MAX_PAUSE_S = 5.0
"""Most seconds until another front is tried after one that could not serve."""

log = logging.getLogger(__name__)


class ReplacedEdges(Protocol):
    """The parts of the edges' processes that an upgrade uses."""

    successor_failed: str

    @property
    def successor_started_at(self) -> float | None:
        """When the edge was started that clients cannot connect to yet, on the monotonic clock."""
        ...

    def replace_next(self, code: Code, drain_s: float) -> bool:
        """Do the next part of replacing the edges; False when nothing is left to do."""
        ...

    def drop_successor(self) -> None:
        """Kill the edge that is being started beside another one."""
        ...


class RunsCode(Protocol):
    """A part of the supervisor that starts processes with some code."""

    def use(self, code: Code) -> None:
        """Start processes with other code from now on."""
        ...


class Upgrade:
    """The upgrades of one server, one at a time, in the thread of its supervisor. A process has `start_s` seconds to
    start."""

    def __init__(
        self, run: RunFolder, standby: Standby, edges: ReplacedEdges, ranks: RunsCode, *, start_s: float
    ) -> None:
        own = Code.own()
        self.record = UpgradeRecord(code=own, origin=own)
        self._run = run
        self._standby = standby
        self._edges = edges
        self._ranks = ranks
        self._start_s = start_s
        self._deadline = 0.0
        self._front_deadline = math.inf
        self._front_deaths = 0
        self._front_tries = 0
        self._front_build = own.build
        self._handing_over = False

    @property
    def active(self) -> bool:
        """Whether `step` has something to do, or waits for the front."""
        return self.record.active

    @property
    def pause_s(self) -> float:
        """Seconds until the next front is to be started: more, the more fronts in a row could not serve."""
        return min(float(max(self._front_tries - 1, 0)), MAX_PAUSE_S)

    def answer(self, request: Mapping[str, Any]) -> Any:
        """The answer to a front: it has an upgrade begun, or says that the ranks are replaced, or why not."""
        record = self.record
        if "begin" in request:
            if record.active:
                return {"refused": f"an upgrade to {record.code.build} is under way"}
            code = Code.from_json(request["begin"])
            if refused := _why_not_supervised(code):
                return {"refused": refused}
            self._front_deaths = self._front_tries = 0
            self._set(
                state="running",
                number=record.number + 1,
                code=code,
                origin=record.code,
                cause="",
                drain_s=request["drain_s"],
            )
            self._enter("front")
        elif record.active and request.get("number") == record.number and record.stage == "ranks":
            if cause := request.get("failed"):
                self._fail(cause)
            elif request.get("state") == record.state:
                self._end()
        return {}

    def on_front_started(self) -> None:
        """The standby front begins to serve."""
        self._front_build = self._standby.code.build
        self._front_deadline = time.monotonic() + self._start_s

    def on_front_ended(self, front: ChildHandle, code: int) -> bool:
        """A front has ended. Returns whether the upgrade explains it, so that another front follows."""
        was_ready = self._run.has_noted("ready", front.pid)
        self._run.forget(front.pid)
        if self._handing_over:
            self._handing_over = False
            return True
        record = self.record
        if not record.active:
            return False
        if was_ready and code == 0:
            return False
        self._front_tries = 0 if was_ready else self._front_tries + 1
        if record.state == "running" and self._front_build == record.code.build:
            self._front_deaths += was_ready
            if not was_ready:
                self._fail(f"the new front ended with code {code} before it served; the server's log says why")
            elif self._front_deaths >= MAX_FRONT_DEATHS:
                self._fail(f"{self._front_deaths} new fronts have ended, the last one with code {code}")
            else:
                return False
            return True
        if not was_ready:
            log.error("a front ended with code %s before it served; another one is tried", code)
        return not was_ready

    def step(self, front: ChildHandle) -> None:
        """Do what is to be done next. `front` is the process that serves, or is about to."""
        if time.monotonic() > self._front_deadline:
            self._front_deadline = math.inf
            if not self._run.has_noted("ready", front.pid):
                log.error("a front did not serve within %g s; it is killed", self._start_s)
                front.kill()
                return
        if self.record.stage == "front":
            self._replace_front(front)
        elif self.record.stage == "edges":
            self._replace_edges()

    def _replace_front(self, front: ChildHandle) -> None:
        record, standby = self.record, self._standby
        if self._front_build == record.code.build:
            if self._run.has_noted("ready", front.pid):
                if standby.code.build != record.code.build:
                    standby.use(record.code)
                self._enter("edges")
        elif standby.code.build != record.code.build:
            standby.use(record.code)
        elif (code := standby.exit_code) is not None:
            self._fail_standby(f"the new front ended with code {code} while it was started; the server's log says why")
        elif standby.waiting:
            self._handing_over = True
            front.kill()  # as any front may end: the next one goes on from the journal, edges and ranks dial it
        elif time.monotonic() > self._deadline:
            self._fail_standby(f"the new front was not started within {self._start_s:g} s")

    def _fail_standby(self, cause: str) -> None:
        going_back = self.record.state != "running"
        self._fail(cause)
        if going_back:
            self._standby.use(self.record.code)
            self._deadline = time.monotonic() + self._start_s

    def _replace_edges(self) -> None:
        record, edges = self.record, self._edges
        if record.state == "running" and edges.successor_failed:
            self._fail(edges.successor_failed)
        elif not edges.replace_next(record.code, record.drain_s):
            self._enter("ranks")
        elif (since := edges.successor_started_at) is not None and time.monotonic() > since + self._start_s:
            edges.drop_successor()
            self._fail(f"a new edge did not serve within {self._start_s:g} s")

    def _enter(self, stage: UpgradeStage) -> None:
        self._deadline = time.monotonic() + self._start_s
        if stage == "ranks":
            self._ranks.use(self.record.code)
        self._set(stage=stage)

    def _fail(self, cause: str) -> None:
        """Go back to the former code. What fails on the way back is tried again, as at any other time."""
        record = self.record
        if record.state != "running":
            log.error("on the way back to %s: %s", record.code.build, cause)
            return
        log.error("the upgrade to %s is rolled back: %s", record.code.build, cause)
        self._edges.drop_successor()
        self._edges.successor_failed = ""
        self._ranks.use(record.origin)
        self._set(state="rolling_back", code=record.origin, origin=record.code, cause=cause)
        if self._standby.code.build != record.origin.build:
            self._standby.use(record.origin)
        self._enter("front")

    def _end(self) -> None:
        record = self.record
        if record.state == "running":
            self._set(state="done", stage="", done=record.done + 1)
        else:
            self._set(state="rolled_back", stage="", rolled_back=record.rolled_back + 1)

    def _set(self, **changes: Any) -> None:
        self.record = dataclasses.replace(self.record, **changes)
        self.record.save(self._run.path)


def _why_not_supervised(code: Code) -> str:
    """Why this process cannot supervise fronts of some code: it stays, while upgrade follows upgrade. Empty when it
    can."""
    ours, theirs = PROTOCOLS["supervisor"], code.protocols.get("supervisor")
    if theirs is not None and ours.common_with(theirs) is not None:
        return ""
    return (
        f"{code.build} speaks version {theirs or 'none'} of the supervisor protocol, and the supervisor, which runs "
        f"since the start of the server, version {ours}. Stop the server, and start it with the new version."
    )
