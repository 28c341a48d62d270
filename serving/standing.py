"""How a server stands, read off what it consists of: its status, what losses would cost, the deployment it is."""

import os
import time
from collections.abc import Collection
from typing import Protocol

from planner.deployment import Deployment, Survive
from serving.config import Settings
from serving.delivery import Delivery
from serving.engine import EngineState
from serving.events import EventLog
from serving.failover import Failover
from serving.ledger import Ledger
from serving.links import RankLinks
from serving.mesh_key import MeshKey
from serving.operations import Operations
from serving.outlook import measured
from serving.prospects import prospects, traffic_now
from serving.replacements import Replacements
from serving.restoration import Restoration
from serving.status import LossCost, ModelInfo, Prospect, RankStatus, Status
from serving.tally import Tally


class Engine(Protocol):
    """What is read of the loop. Nothing of it is changed here."""

    settings: Settings
    model: ModelInfo
    state: EngineState
    events: EventLog
    failover: Failover
    links: RankLinks
    ledger: Ledger
    delivery: Delivery
    operations: Operations
    replacements: Replacements
    restoration: Restoration
    tally: Tally
    recoveries: int


class Standing:
    """Tells of one server; keeps what losses cost until that changes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._started_at = time.time()
        self._priced: dict[int, LossCost] = {}
        self._priced_at: tuple[int, frozenset[MeshKey], tuple[int, int]] | None = None

    def status(self, *, draining: bool, ended: bool, lost: Collection[int]) -> Status:
        """The server now; ranks that are `lost` may be in the plan still."""
        engine, failover, state, ledger = self._engine, self._engine.failover, self._engine.state, self._engine.ledger
        plan, tally, delivery, operations = failover.plan, engine.tally, engine.delivery, engine.operations
        return Status(
            epoch=max(failover.epoch, 0),
            generation=failover.generation,
            ready=failover.can_step and not (draining or operations.paused or ended),
            draining=draining,
            chaos=engine.settings.chaos,
            ranks=tuple(self._rank(rank, rank in lost) for rank in failover.plans.base.rank_ids),
            axes=dict(plan.axes) if plan is not None else {},
            slots_per_rank=plan.slots_per_rank if plan is not None else 0,
            masked=plan.masked if plan is not None else (),
            lattice=failover.coverage(),
            running=len(state.running),
            waiting=len(state.waiting),
            finished=delivery.finished,
            failed=delivery.failed,
            recoveries=engine.recoveries,
            tokens=delivery.tokens,
            steps=tally.steps,
            step_ms=tally.step_ms,
            program_ms=tally.program_ms,
            rank_ms=tally.rank_ms,
            rows=tally.rows,
            rows_filled=tally.rows_filled,
            buckets=engine.settings.buckets,
            preemptions=state.preemptions,
            prefix_queries=state.prefix_queries,
            prefix_hits=state.prefix_hits,
            compiles_after_ready=tally.compiles_since,
            started_at=self._started_at,
            paused=operations.paused,
            operable=engine.settings.operate,
            degraded=delivery.degraded,
            journal=("failing" if ledger.trouble else "on") if ledger.keeps else "off",
            restored=operations.restored,
            page_size=engine.settings.page_size,
            experts_loaded=failover.experts_loaded,
            expert_load=tuple(map(tuple, tally.expert_load.tolist())),
            protection=failover.copies.way,
            protected_bytes=failover.copies.bytes,
            experts_rebuilt=failover.parity.rebuilt,
            parity_groups=failover.parity.progress[0],
            parity_wanted=failover.parity.progress[1],
            parity_bytes=failover.parity.kept_bytes,
            tokens_restored=engine.restoration.restored,
            tokens_recomputed=engine.restoration.recomputed,
            front_pid=os.getpid(),
        )

    def what_if(self) -> tuple[Prospect, ...]:
        """What the loss of each rank, and of each host of several, would cost now."""
        deployment, running = self.deployment(), self._engine.state.running.values()
        if deployment is None:
            return ()
        recovery, failover = measured(self._engine.events.past()), self._engine.failover
        there = {"protected": failover.copies.on, "kept": failover.parity.groups}
        return prospects(deployment, recovery, failover.is_ready_without, running, **there)

    def deployment(self) -> Deployment | None:
        """The plan in force with all it is for; None while no rank is alive."""
        engine, failover, load = self._engine, self._engine.failover, self._engine.tally.expert_load
        if failover.plan is None:
            return None
        return Deployment(
            plan=failover.plan,
            workload=failover.plans.workload,
            cluster=failover.plans.cluster,
            traffic=traffic_now(engine.state.running.values(), engine.model.max_context),
            survive=Survive(ranks=engine.settings.survive),
            loads=tuple(tuple(map(float, row)) for row in load) if load.size and load.sum(1).all() else (),
            config=failover.config,
        )

    def _costs(self) -> dict[int, LossCost]:
        """What each single loss would cost; worked out anew when the plan or what is prepared has changed."""
        failover = self._engine.failover
        at = (failover.epoch, frozenset(failover.meshes.connected), failover.parity.progress)
        if failover.plan is not None and at != self._priced_at:
            recovery = measured(self._engine.events.past())
            self._priced_at, self._priced = at, failover.loss_costs(self._engine.tally.expert_load, recovery)
        return self._priced

    def _rank(self, rank: int, lost: bool) -> RankStatus:
        engine, failover, tally = self._engine, self._engine.failover, self._engine.tally
        plan, pool, process = failover.plan, engine.state.pools.get(rank), engine.links.get(rank)
        serving = plan is not None and rank in plan.rank_ids and not lost
        states = {
            "draining": serving and rank in engine.operations.leaving,
            "serving": serving,
            "joining": rank in failover.joining,
            "starting": engine.replacements.is_starting(rank),
            "out": rank in engine.operations.out,
        }
        state = next((name for name, holds in states.items() if holds), "dead")
        held = plan.slots_of(rank).tolist() if serving and plan is not None and rank in plan.holder_ids else ()
        place = failover.plans.place_of(rank)
        return RankStatus(
            id=rank,
            pid=process.process.pid if process is not None and process.loss is None else None,
            host=place.host,
            rack=place.rack,
            state=state,
            role=plan.role(rank) if serving and plan is not None else failover.plans.base.role(rank),
            slots=tuple(map(tuple, held)),
            pages=pool.total if pool else 0,
            pages_used=pool.used if pool else 0,
            running=sum(s.rank == rank for s in engine.state.running.values()),
            compiles=tally.compiles.get(rank, 0),
            step_ms=tally.last_ms.get(rank, 0.0),
            slowness=tally.slowness.get(rank, 0.0),
            level=engine.operations.levels.get(rank, 0),
            loss=self._costs().get(rank) if serving else None,
        )
