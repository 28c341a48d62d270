"""Builds the server's status, loss forecasts and deployment description from its parts."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.deployment import Deployment, FaultTolerance
from serving.core.engine_shell import EngineShell
from serving.core.recovery_report import RecoveryReport
from serving.executor.mesh_key import MeshKey
from serving.launch.upgrade_record import UpgradeRecord
from serving.protocol import clock
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.status import EdgeStatus, LossCost, LossForecast, RankStatus, Status
from serving.recovery.certificate_watch import CertificateState, CertificateWatch, InForce
from serving.recovery.loss_forecast import current_traffic, loss_costs, loss_forecasts, measured_recovery
from serving.recovery.membership import RankState
from serving.version import build

_STATE_NAMES = {
    RankState.STARTING: "starting",
    RankState.READY: "joining",
    RankState.JOINING: "joining",
    RankState.JOINED: "joining",
    RankState.SERVING: "serving",
    RankState.LEAVING: "draining",
    RankState.LOST: "dead",
    RankState.OUT: "out",
}
"""The states of a rank as `RankStatus.state` has them on the wire."""


class StatusReport:
    """Reports on one server. Caches the costs of losses until the plan or what is prepared changes."""

    def __init__(self, engine: EngineShell, model: ModelInfo, recovery_report: RecoveryReport) -> None:
        self._engine = engine
        self._model = model
        self._recovery_report = recovery_report
        self._started_at = clock.wall()
        self._config: Mapping[str, Any] = json.loads(engine.failover.model.config)
        self._certificate = CertificateWatch(engine.settings)
        self._loss_costs: dict[int, LossCost] = {}
        self._loss_costs_key: tuple[int, frozenset[MeshKey], tuple[int, int]] | None = None

    def status(
        self, *, draining: bool, ended: bool, edges: tuple[EdgeStatus, ...], upgrade: UpgradeRecord | None
    ) -> Status:
        """The status now."""
        engine, failover, state = self._engine, self._engine.failover, self._engine.state
        request_log, step_stats, output_streams = engine.request_log, engine.step_stats, engine.output_streams
        plan, maintenance, settings = failover.plan, engine.maintenance, engine.settings
        certificate = self._certificate_state()
        return Status(
            epoch=max(failover.epoch, 0),
            generation=failover.membership.generation,
            ready=failover.adoption.can_step and not (draining or maintenance.paused or ended),
            draining=draining,
            chaos=settings.chaos,
            ranks=tuple(self._rank(rank) for rank in failover.plans.base.rank_ids),
            axes=dict(plan.axes) if plan is not None else {},
            slots_per_rank=plan.slots_per_rank if plan is not None else 0,
            masked=plan.masked if plan is not None else (),
            lattice=failover.preparation.coverage(),
            running=len(state.running),
            waiting=len(state.waiting),
            finished=output_streams.finished,
            failed=output_streams.failed,
            recoveries=self._recovery_report.recoveries,
            tokens=output_streams.tokens,
            steps=step_stats.steps,
            step_ms=step_stats.step_ms,
            program_ms=step_stats.program_ms,
            rank_ms=step_stats.rank_ms,
            rows=step_stats.rows,
            rows_filled=step_stats.rows_filled,
            buckets=settings.buckets,
            preemptions=state.preemptions,
            prefix_queries=state.prefix_queries,
            prefix_hits=state.prefix_hits,
            kv_cache_type=failover.model.cache_format,
            kv_token_bytes=failover.model.cache_bytes_per_token,
            speculate=settings.speculate,
            drafts=state.drafts,
            drafted=state.drafted,
            accepted=state.accepted,
            draft_passes_skipped=state.draft_passes_skipped,
            compiles_after_ready=step_stats.compiles_after_start,
            started_at=self._started_at,
            paused=maintenance.paused,
            operable=settings.operate,
            degraded=output_streams.degraded,
            journal=("failing" if request_log.write_error else "on") if request_log.enabled else "off",
            restored=maintenance.repair.experts_restored,
            page_size=settings.page_size,
            experts_loaded=failover.adoption.experts_loaded,
            expert_load=tuple(map(tuple, step_stats.expert_load.tolist())),
            protection=failover.kv_replicas.channel,
            protected_bytes=failover.kv_replicas.bytes,
            experts_rebuilt=failover.parity.rebuilt,
            parity_groups=failover.parity.progress[0],
            parity_wanted=failover.parity.progress[1],
            parity_bytes=failover.parity.host_bytes,
            tokens_restored=engine.restoration.restored,
            tokens_recomputed=engine.restoration.recomputed,
            front_pid=os.getpid(),
            edges=edges,
            suspects=len(state.suspicion.suspects),
            convicted=engine.suspects.convicted,
            weights_version=failover.membership.weights.label,
            next_weights_version=maintenance.weights.next_label,
            weights_switches=maintenance.weights.switches,
            certificate=certificate.state,
            certificate_reason=certificate.reason,
            certificate_repair=certificate.repair,
            build=build(),
            upgrade=upgrade.state if upgrade is not None else "",
            upgrade_stage=upgrade.stage if upgrade is not None else "",
            upgrade_build=upgrade.code.build if upgrade is not None else "",
            upgrade_cause=upgrade.cause if upgrade is not None else "",
            upgrades_done=upgrade.done if upgrade is not None else 0,
            upgrades_rolled_back=upgrade.rolled_back if upgrade is not None else 0,
        )

    def what_if(self) -> tuple[LossForecast, ...]:
        """Forecasts of the loss of each rank, and of each host with several ranks."""
        deployment, running = self.deployment(), self._engine.state.running.values()
        if deployment is None:
            return ()
        recovery, failover = self._recovery(), self._engine.failover
        return loss_forecasts(
            deployment,
            recovery,
            failover.preparation.is_prepared_without,
            running,
            protected=failover.kv_replicas.on,
            kept=failover.parity.groups,
        )

    def _recovery(self) -> RecoveryTimes:
        """The phases of this server's own recoveries."""
        left = len(self._engine.failover.plans.base.rank_ids) - 1
        return measured_recovery(self._engine.events.retained(), left)

    def deployment(self) -> Deployment | None:
        """The plan in force with its model, cluster, loads, traffic and measured recoveries; None without a plan."""
        engine, failover, load = self._engine, self._engine.failover, self._engine.step_stats.expert_load
        if failover.plan is None:
            return None
        recovery = self._recovery()
        return Deployment(
            plan=failover.plan,
            workload=failover.plans.workload,
            cluster=failover.plans.cluster,
            traffic=current_traffic(engine.state.running.values(), self._model.max_context),
            survive=FaultTolerance(ranks=engine.settings.survive),
            loads=tuple(tuple(map(float, row)) for row in load) if load.size and load.sum(1).all() else (),
            config=self._config,
            recovery=recovery if recovery.source == "measured" else None,
        )

    def _certificate_state(self) -> CertificateState:
        """The state of the server's certificate, checked again when the plan in force has changed."""
        failover = self._engine.failover
        key = (failover.epoch, failover.plan is None, self._recovery_report.recoveries)
        return self._certificate.state(key, self._in_force)

    def _in_force(self) -> InForce | None:
        """The plan in force, and what it would be with lost ranks back; None without a plan."""
        now, plans = self.deployment(), self._engine.failover.plans
        if now is None:
            return None
        alive = now.plan.rank_ids
        return InForce(
            deployment=now,
            lost=tuple(rank for rank in plans.base.rank_ids if rank not in alive),
            with_back=lambda back: dataclasses.replace(now, plan=plans.of((*alive, *back))),
        )

    def _current_loss_costs(self) -> dict[int, LossCost]:
        """By rank, the cost of its loss; computed again when the plan or what is prepared has changed."""
        failover = self._engine.failover
        at = (failover.epoch, failover.membership.connected, failover.parity.progress)
        if failover.plan is not None and at != self._loss_costs_key:
            recovery = self._recovery()
            prepared, kept = failover.preparation.prepared_losses(), failover.parity.groups
            load, plans = self._engine.step_stats.expert_load, failover.plans
            self._loss_costs_key = at
            self._loss_costs = loss_costs(
                failover.plan, plans.workload, plans.cluster, load, recovery, prepared, kept=kept
            )
        return self._loss_costs

    def _rank(self, rank: int) -> RankStatus:
        engine, failover, step_stats = self._engine, self._engine.failover, self._engine.step_stats
        plan, pool, process = failover.plan, engine.state.pools.get(rank), engine.executor.get(rank)
        state = failover.membership.state(rank)
        serving = state in (RankState.SERVING, RankState.LEAVING)
        held = plan.slots_of(rank).tolist() if serving and plan is not None and rank in plan.expert_rank_ids else ()
        place = failover.plans.device_of(rank)
        return RankStatus(
            id=rank,
            pid=process.process.pid if process is not None and process.loss is None else None,
            host=place.host,
            rack=place.rack,
            state=_STATE_NAMES[state],
            role=plan.role(rank) if serving and plan is not None else failover.plans.base.role(rank),
            slots=tuple(map(tuple, held)),
            pages=pool.total if pool else 0,
            pages_used=pool.used if pool else 0,
            running=sum(s.rank == rank for s in engine.state.running.values()),
            compiles=step_stats.compiles.get(rank, 0),
            step_ms=step_stats.last_ms.get(rank, 0.0),
            slowness=step_stats.slowness.get(rank, 0.0),
            level=engine.maintenance.error_levels.get(rank, 0),
            last_failure=engine.suspects.last_failures.get(rank, ""),
            loss=self._current_loss_costs().get(rank) if serving else None,
            build=process.build if process is not None else "",
            relay=process.relay if process is not None else "",
            snapshots=engine.state.limits.snapshots if pool else 0,
            snapshots_used=len(pool.snapshots.places) if pool else 0,
        )
