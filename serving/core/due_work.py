"""Does what is due between two steps: one piece at a time, in the order of `serving.recovery.due`."""

import contextlib
from collections.abc import Iterator

from planner.plan.plan import Plan
from serving.core.engine_shell import EngineShell
from serving.core.recovery_report import RecoveryReport, causes
from serving.core.unreadable_experts import UnreadableExperts
from serving.errors import NoCapacity
from serving.executor.failure_detector import Cause
from serving.executor.incarnation import Loss
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.protocol import clock
from serving.protocol.events import EventKind
from serving.recovery.due import ONE_AT_A_TIME, DueWork, Pending, due_work, must_recover
from serving.recovery.membership_events import GenerationFailed

PREPARE_AHEAD_S = 1.0
"""Seconds between two attempts to prepare a mesh that joined ranks wait for."""


class DueWorker:
    """Does the work that is due on the ranks of one server."""

    def __init__(self, engine: EngineShell, report: RecoveryReport) -> None:
        self._engine = engine
        self._failover = engine.failover
        self._events = engine.events
        self._report = report
        self._unreadable = UnreadableExperts(engine.failover, engine.events)
        self._admitted_at = 0.0
        self._prepared_ahead_at = 0.0

    def due(self) -> Iterator[DueWork]:
        """The work that is due now, in its order."""
        engine, failover = self._engine, self._failover
        pending = Pending(
            restoring=engine.restoration.pending,
            maintaining=engine.maintenance.pending or engine.rebalancing.pending,
            spare_ids=failover.spare_ids,
            loading=failover.meshes.loading,
            retry_preparation=clock.now() - self._prepared_ahead_at > PREPARE_AHEAD_S,
            feasible=lambda ranks: not failover.plans.why_infeasible(ranks),
            prepared=failover.preparation.is_prepared,
        )
        return due_work(failover.membership, pending, clock.now())

    async def run(self) -> None:
        """Do what is due before the next step; after a recovery, or an interruption, look again from the top."""
        failover = self._failover
        while True:
            while next(self.due(), None) is DueWork.RECOVER:
                await self._recover()
            try:
                await self._between_steps()
                if failover.membership.plan is None or not must_recover(failover.membership):
                    return
            except RankLost as error:
                if not failover.membership.losses:
                    failover.mark_comm_broken()
                self._events.emit(EventKind.INTERRUPTED, failover.epoch, rank=error.rank, cause=str(error))
            except (CommandFailed, TimeoutError) as error:
                failover.mark_comm_broken()
                self._events.emit(EventKind.BROKEN, failover.epoch, cause=str(error) or type(error).__name__)

    async def _between_steps(self) -> None:
        """Do what is due while no rank is missing. Raises RankLost, CommandFailed or TimeoutError."""
        engine, failover = self._engine, self._failover
        engine.canary.submit_requested()
        if failover.plan is not None:
            await engine.restoration.run()
            if DueWork.MAINTAIN in self.due():
                await engine.maintenance.run()
                engine.rebalancing.begin()
        work = next((due for due in self.due() if due in ONE_AT_A_TIME), None)
        if work is DueWork.SWITCH_WEIGHTS:
            await self._switch_weights()
        elif work is DueWork.ADMIT:
            self._admitted_at = clock.now()
            failover.joining.begin()
        elif work is DueWork.REJOIN:
            await self._rejoin()
        elif failover.plan is None:
            return
        elif work is DueWork.EXPAND:
            await self._expand_plan()
        elif work is DueWork.RECONCILE:
            await self._reconcile(failover.plan)
        elif work is DueWork.PREPARE_AHEAD:
            self._prepared_ahead_at = clock.now()
            failover.preparation.prepare_ahead()
        elif work is DueWork.CONNECT:
            with contextlib.suppress(RankLost, CommandFailed, TimeoutError):
                if await failover.preparation.connect_next():
                    text = f"{len(failover.membership.connected)} meshes"
                    self._events.emit(EventKind.LATTICE_READY, failover.epoch, message=text)
        engine.rebalancing.look()
        self._unreadable.report_and_retry()

    async def _recover(self) -> None:
        """Continue without the lost ranks, or in a new generation; without capacity, wait for others."""
        engine, failover, began = self._engine, self._failover, clock.now()
        losses: dict[int, Loss] = {}

        def lost() -> set[int]:
            losses.update(failover.membership.losses)
            return set(losses)

        try:
            phases = await failover.recover(lost, engine.pages_used)
        except NoCapacity as error:
            phases = None
            self._events.emit(EventKind.NO_CAPACITY, failover.epoch, cause=causes(losses), message=str(error))
        lost()
        engine.maintenance.on_lost(set(losses))
        recoverable, recomputed = engine.restoration.recoverable_of({*losses, *failover.membership.invalidated})
        engine.apply_plan(losses, recoverable)
        engine.suspects.judge_losses(losses)
        if phases is not None:
            restored = sum(each.count for each in recoverable.values())
            outcome = f"{restored} cache entries to restore, {recomputed} to compute again"
            self._report.begin(losses, began, phases, outcome)

    async def _switch_weights(self) -> None:
        """Put the plan in force into force once more, with the weights that were decided on."""
        await self._failover.adoption.adopt_weights()
        self._engine.plan_adopted()

    async def _reconcile(self, plan: Plan) -> None:
        """Load some of the experts that the plan in force lacks of the desired one."""
        await self._failover.adoption.reconcile()
        self._engine.plan_adopted()
        if not self._failover.adoption.reconciling and not self._engine.rebalancing.moving:
            masked = self._failover.plan.masked if self._failover.plan is not None else plan.masked
            self._events.emit(EventKind.HEALED, self._failover.epoch, message=f"{len(masked)} experts masked")

    async def _expand_plan(self) -> None:
        """Put a plan into force that has the ranks which joined the generation."""
        failover, joined = self._failover, self._failover.membership.joined
        try:
            phases = await failover.expand()
        except (RankLost, CommandFailed) as error:
            self._events.emit(EventKind.REJOIN_FAILED, failover.epoch, cause=str(error))
            joined = joined.intersection(failover.plan_ranks).difference(failover.membership.losses)
            phases = {}
        if not joined:
            self._engine.plan_adopted()
            return
        self._on_joined(joined, phases | {"total": 1e3 * (clock.now() - self._admitted_at)})

    async def _rejoin(self) -> None:
        """Start a new generation of the ranks alive and the ready ones."""
        failover, began = self._failover, clock.now()
        membership = failover.membership
        joiners, waited = membership.ready | membership.joined, membership.suspended
        try:
            phases = await failover.generations.start((*failover.plan_ranks, *joiners), self._engine.pages_used())
        except (RankLost, CommandFailed, TimeoutError) as error:
            self._events.emit(EventKind.REJOIN_FAILED, failover.epoch, cause=str(error) or type(error).__name__)
            for rank in sorted((failover.membership.joining & joiners) - failover.membership.suspended):
                self._engine.executor.declare(rank, Cause("error", "could not join"), clock.now())
            failover.state.record(GenerationFailed())
            return
        self._on_joined(joiners - waited, phases | {"total": 1e3 * (clock.now() - began)})

    def _on_joined(self, joiners: frozenset[int], phases: dict[str, float]) -> None:
        for rank in joiners:
            self._engine.step_stats.forget_rank(rank)
            self._engine.replacements.on_joined(rank)
        self._engine.apply_plan(joiners)
        self._engine.canary.on_joined(joiners)
        for rank in sorted(joiners):
            self._events.emit(EventKind.REJOINED, self._failover.epoch, rank=rank, phases=phases)
        self.report_missing_replicas()

    def report_missing_replicas(self) -> None:
        """Report once why KV caches have no replicas although they should."""
        if warning := self._failover.kv_replicas.take_warning():
            self._events.emit(EventKind.UNPROTECTED, self._failover.epoch, message=warning)
