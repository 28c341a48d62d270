"""The front's part in an upgrade: it checks the new code, records what canaries must answer, has the supervisor begin,
and replaces the ranks one after the other (docs/decisions/0026).
"""

import asyncio
import contextlib
import json
import logging
import math
import os
from pathlib import Path

from serving.core.canary import Answers
from serving.core.canary_text import answer_text
from serving.core.engine_shell import EngineShell
from serving.core.request_processor import RequestProcessor
from serving.errors import Conflict, Internal, InvalidRequest, NoCapacity, StartError
from serving.executor.failure_detector import Cause
from serving.launch.code import Code, check_owned, read_code
from serving.launch.run_folder import RunFolder
from serving.launch.supervised import request_supervisor
from serving.launch.upgrade_record import UpgradeRecord
from serving.protocol import clock
from serving.protocol.events import EventKind
from serving.protocol.instructions import Instruction
from serving.protocol.versions import check_common
from serving.recovery.membership import RankState
from serving.version import PACKAGES

POLL_S = 0.05
"""Seconds between two looks at the record of the upgrade, and at a rank that is replaced."""
IDLE_S = 1.0
"""Seconds between two looks at the record while no upgrade is under way: `begin` reads it."""
RETRY_S = 1.0
"""Seconds until a rank is asked to leave again that could not."""
FAILURES = frozenset({EventKind.RESTART_FAILED, EventKind.DRAIN_FAILED})
"""Events of a rank that is replaced which end the upgrade."""

log = logging.getLogger(__name__)


class Upgrades:
    """The upgrades of one server, as a front with edges sees them."""

    def __init__(self, engine: EngineShell, run: RunFolder) -> None:
        self.processor: RequestProcessor
        self.record: UpgradeRecord | None = UpgradeRecord.load(run.path)
        """The last upgrade; None before the first."""
        self._engine = engine
        self._run = run
        self._own = Code.own()
        self._began = False
        self._replacing: asyncio.Task[None] | None = None
        self._seen: tuple[int, str, str] = (0, "", "")
        engine.canary.on_failed = self._on_canary_failed
        self._take(self.record)

    @property
    def active(self) -> bool:
        """Whether processes are being replaced."""
        return self.record is not None and self.record.active

    @property
    def busy(self) -> bool:
        """Whether one is under way, or about to begin."""
        return self._began or self.active

    # -- A front that begins ------------------------------------------------------------------------------------

    def try_front(self) -> "asyncio.Future[str] | None":
        """Have this front compute its canaries before anything else, if it runs the new code of an upgrade. The future
        gets why it must not serve."""
        if self.record is None or self.record.state != "running":
            return None
        return self._engine.canary.begin()

    # -- An instruction -----------------------------------------------------------------------------------------

    async def begin(self, instruction: Instruction) -> None:
        """Begin an upgrade; returns once the supervisor has begun. Raises InvalidRequest for code that cannot replace
        this one, Conflict while another change is under way, and NoCapacity while not all ranks serve."""
        if self.busy:
            code = self.record.code.build if self.record is not None and self.active else "other code"
            raise Conflict(f"an upgrade to {code} is under way. Wait for it (`moejax status`), then try again.")
        if self._engine.maintenance.weights.next_label:
            raise Conflict("new weights are being brought in. Wait for them (`moejax status`), then try again.")
        if self._engine.maintenance.paused:
            raise Conflict("the server is paused. `moejax apply retry` has it go on; then try again.")
        if self._engine.rebalancing.moving:
            raise Conflict("experts are being moved. Wait for them (`moejax status`), then try again.")
        self._began = True
        try:
            self._check_ranks()
            code = await self._code_of(instruction)
            limit_s = self._engine.settings.start_timeout_s
            try:
                async with asyncio.timeout(limit_s):
                    await self._record_answers()
            except TimeoutError:
                raise Internal(
                    f"the server has not answered a canary before the upgrade within {limit_s:g} s."
                ) from None
            answer = request_supervisor(
                self._run.path, upgrade={"begin": code.to_json(), "drain_s": instruction.timeout_s}
            )
            if "refused" in answer:
                raise Conflict(answer["refused"])
            self._take(UpgradeRecord.load(self._run.path))
        except OSError as error:
            raise Internal(f"the supervisor cannot be reached: {error}") from None
        finally:
            self._began = False

    def _check_ranks(self) -> None:
        failover = self._engine.failover
        ranks = self._wanted_ranks()
        if not failover.single_host:
            raise InvalidRequest(
                "an upgrade replaces ranks that the front starts itself; this server has ranks on other hosts. Start a "
                "server with the new version beside it, or restart it with its hosts (docs/runbook.md).",
                param="action",
            )
        missing = [rank for rank in ranks if failover.membership.state(rank) is not RankState.SERVING]
        if missing:
            raise NoCapacity(f"ranks {missing} do not serve, or leave. Wait until all do, or `moejax apply retry`.")
        if failover.plan is not None and failover.plan.masked:
            raise NoCapacity(
                f"{len(failover.plan.masked)} experts are masked, so that answers could not be compared. Wait until "
                "they are loaded (`moejax status`), then try again."
            )
        for rank in ranks:
            left = [each for each in ranks if each != rank]
            if why := failover.plans.why_infeasible(left):
                raise NoCapacity(f"ranks are replaced one after the other, and ranks {left} cannot serve alone: {why}")

    def _wanted_ranks(self) -> list[int]:
        """The ranks that are to serve: all but the ranks which were taken out."""
        failover = self._engine.failover
        return [rank for rank in failover.plans.base.rank_ids if not failover.membership.is_out(rank)]

    async def _code_of(self, instruction: Instruction) -> Code:
        """The code that an instruction names."""
        path = os.path.realpath(instruction.path) if instruction.path else ""
        python = instruction.python or self._own.python
        if Path(python).is_dir():
            python = str(Path(python) / "bin" / "python")
        if path and not (Path(path) / "serving").is_dir():
            raise InvalidRequest(f"path is {path}, which has no folder serving/. Name a checkout.", param="path")
        if path:
            check_owned(path, *(f"{path}/{name}" for name in PACKAGES), param="path")
        if python != self._own.python:
            environment = Path(python).parent.parent
            check_owned(python, *map(str, (environment, *environment.glob("lib/*/site-packages"))), param="python")
        code = await read_code(python, path)
        if code.build == self._own.build:
            raise InvalidRequest(f"the server runs {code.build} already.", param="path")
        if (code.python, code.root) == (self._own.python, self._own.root):
            raise InvalidRequest(
                f"{code.root} was changed from {self._own.build} to {code.build} while the server runs it, so that "
                "there is no way back. Put the new version into a folder of its own.",
                param="path",
            )
        for name, ours in self._own.protocols.items():
            if name not in code.protocols:
                raise InvalidRequest(f"{code.build} does not say which {name} protocol it speaks.", param="path")
            try:
                way_out = "Stop the server, and start it with the new version."
                check_common(name, ours, code.protocols[name], who=code.build, way_out=way_out)
            except StartError as error:
                raise InvalidRequest(str(error), param="path") from None
        return code

    async def _record_answers(self) -> None:
        """Write what canaries must answer: the ranks, with code that is trusted, and the tokenizer of this front."""
        canary = self._engine.canary
        canary.expected = None
        cause = await asyncio.shield(canary.request())
        if cause:
            raise Internal(f"the ranks do not agree before the upgrade: {cause}")
        text = await answer_text(self.processor)
        self._run.canary.write_text(json.dumps({"ranks": canary.expected, "text": text}))

    # -- The record ---------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Follow the record, and do this front's part, until the server ends."""
        while True:
            try:
                known = self.record
                record = await asyncio.to_thread(UpgradeRecord.load, self._run.path)
                if self.record is not known:  # `begin` or a report has read a later one meanwhile
                    continue
                self._take(record)
                if record is not None and record.active and record.stage == "ranks" and self._replacing is None:
                    self._replacing = asyncio.create_task(self._replace_ranks(record))
                elif self._replacing is not None and self._replacing.done():
                    replacing, self._replacing = self._replacing, None
                    replacing.result()
            except Exception as error:  # what follows depends on it: it goes on, and the upgrade fails
                log.exception("this front's part of the upgrade has failed")
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    self._report_failed(f"{type(error).__name__}: {error}")
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(POLL_S if self.busy else IDLE_S)

    def _take(self, record: UpgradeRecord | None) -> None:
        """Take note of the record, and emit the events of what has changed."""
        self.record = record
        if record is None:
            return
        canary = self._engine.canary
        canary.tries_joiners = record.state == "running"
        if record.state == "running" and canary.expected is None:
            canary.expected = _read_answers(self._run)
        seen = (record.number, record.state, record.stage)
        if seen == self._seen:
            return
        (number, state, _), self._seen = self._seen, seen
        if not number and not record.active:
            return  # an earlier front has said so
        kind = EventKind.UPGRADING
        if (
            record.state == "rolling_back"
            and state != record.state
            and self._run.first_to_note(f"upgrade {record.number} failed")
        ):
            kind = EventKind.UPGRADE_FAILED
        elif not record.active:
            kind = EventKind.UPGRADED if record.state == "done" else EventKind.ROLLED_BACK
        stage = f", {record.stage}" if record.stage else ""
        text = f"{record.code.build}{stage}"
        self._engine.events.emit(kind, self._engine.failover.epoch, cause=record.cause, message=text)

    # -- Ranks --------------------------------------------------------------------------------------------------

    async def _replace_ranks(self, record: UpgradeRecord) -> None:
        """Replace each rank that runs other code. Ends early when the supervisor has turned round."""
        for rank in self._engine.failover.plans.base.rank_ids:
            cause = await self._replace(rank, record)
            if self._turned(record):
                return
            if cause:
                self._report(failed=cause, number=record.number)
                return
        self._report(number=record.number, state=record.state)

    async def _replace(self, rank: int, record: UpgradeRecord) -> str:
        """Replace a rank, and wait until it serves with the code, and until its loss and that of any other rank is
        prepared for. Returns why it could not be; on the way back it is tried until it can."""
        engine, build = self._engine, record.code.build
        since = max((event.sequence for event in engine.events.retained()), default=0)
        until, asked_at = clock.now() + engine.settings.start_timeout_s, -math.inf
        while not self._turned(record):
            membership = engine.failover.membership
            if membership.is_out(rank):
                return ""
            serving = membership.state(rank) is RankState.SERVING
            for each in self._wanted_ranks() if record.state == "rolling_back" else [rank]:
                if membership.can_start(each):
                    engine.replace(each)
            if serving and self._build_of(rank) == build and not engine.canary.busy and self._prepared():
                return ""
            again = clock.now() - asked_at > RETRY_S if record.state == "rolling_back" else asked_at == -math.inf
            if serving and self._build_of(rank) != build and again and self._may_leave(rank):
                engine.maintenance.leave(rank, f"upgrade to {build}", replace=True)
                engine.wake()
                asked_at = clock.now()
            if record.state == "running":
                failed = [
                    event
                    for event in engine.events.retained()
                    if event.sequence > since and event.rank == rank and event.kind in FAILURES
                ]
                if failed:
                    return f"rank {rank}: {failed[-1].cause}"
                if clock.now() > until:
                    return f"rank {rank} did not serve with the new code within {engine.settings.start_timeout_s:g} s"
            await asyncio.sleep(POLL_S)
        return ""

    def _turned(self, record: UpgradeRecord) -> bool:
        """Whether the supervisor follows another record than this one by now."""
        now = self.record
        return now is None or (now.number, now.state, now.stage) != (record.number, record.state, record.stage)

    def _prepared(self) -> bool:
        return self._engine.failover.preparation.coverage().get("1 rank", 1.0) == 1.0

    def _may_leave(self, rank: int) -> bool:
        """Whether a rank may leave now: all others that are to serve do so, and go on without it, as is prepared."""
        failover = self._engine.failover
        left = [each for each in self._wanted_ranks() if each != rank]
        if any(failover.membership.state(each) is not RankState.SERVING for each in left):
            return False
        return not failover.plans.why_infeasible(left) and self._prepared()

    def _build_of(self, rank: int) -> str:
        process = self._engine.executor.get(rank)
        return "" if process is None else process.build

    def _on_canary_failed(self, ranks: frozenset[int], cause: str) -> None:
        """Ranks that have joined do not answer as the others do: they are ended before they compute for a client. The
        supervisor starts the next ones with the former code."""
        engine, record = self._engine, self.record
        for rank in sorted(ranks):
            engine.events.emit(EventKind.CANARY_FAILED, engine.failover.epoch, rank=rank, cause=cause)
        try:
            self._report_failed(cause)
        except (OSError, ValueError, KeyError, TypeError):
            log.exception("a failed canary could not be reported to the supervisor")
        if not ranks and record is not None and record.state == "running" and record.stage == "ranks":
            # A front that died before they were tried has let them join: any rank with the new code may be the one.
            former = record.origin.build
            ranks = frozenset(each for each in engine.failover.plan_ranks if self._build_of(each) != former)
        for rank in sorted(ranks):
            incarnation = engine.executor.get(rank)
            if incarnation is not None and incarnation.loss is None:
                engine.executor.declare(rank, Cause("error", f"canary: {cause}"), clock.now())

    def _report_failed(self, cause: str) -> None:
        if self.record is not None and self.record.active:
            self._report(failed=cause, number=self.record.number)

    def _report(self, **report: object) -> None:
        """Say to the supervisor how far the ranks are."""
        request_supervisor(self._run.path, upgrade=report)
        self._take(UpgradeRecord.load(self._run.path))


def _read_answers(run: RunFolder) -> Answers | None:
    """The answers of canaries as they were recorded when the upgrade began."""
    if not run.canary.exists():
        return None
    return tuple(map(tuple, json.loads(run.canary.read_text())["ranks"]))
