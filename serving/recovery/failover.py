"""Keeps a set of ranks serving under a plan: the start, losses, new generations, and ranks that join.

Every stage may be cut short by another loss: it is then done again without all ranks lost until then
(docs/decisions/0003).
"""

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from planner.inputs.cluster import Cluster
from planner.plan.plan import Plan
from serving.config import Settings
from serving.errors import NoCapacity
from serving.executor.executor import RankExecutor
from serving.executor.incarnation import Loss
from serving.executor.mesh_key import MeshKey
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.launch.coordinator import LOOPBACK
from serving.launch.weights_record import WeightsRecord
from serving.protocol.events import EventKind, EventLog
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.weights import FIRST_WEIGHTS, WeightsVersion
from serving.recovery.adoption import Adoption
from serving.recovery.effects import Effects
from serving.recovery.expert_parity import ExpertParity
from serving.recovery.first_start import FirstStart
from serving.recovery.generations import Generations
from serving.recovery.joining import Joining
from serving.recovery.kv_replicas import KVReplicas
from serving.recovery.membership import Membership
from serving.recovery.membership_events import CommBroken, ExchangeFailed, Lost
from serving.recovery.mesh_pool import MeshPool
from serving.recovery.mesh_preparation import MeshPreparation
from serving.recovery.phase_times import PhaseTimes
from serving.recovery.plan_catalog import PlanCatalog
from serving.recovery.rank_configuration import RankConfiguration
from serving.recovery.rank_start import RankStart
from serving.recovery.recovery_state import RecoveryState
from serving.recovery.rendezvous import Rendezvous
from serving.recovery.take_over import TakeOver


class Failover:
    """The ranks of one server, and what happens when one is lost or joins. Its methods are called by one task at a
    time, the engine's loop; only `rank_start` runs beside them, and `on_rank_lost` whenever a rank is lost.

    `placement` is the file of the base plan that an earlier front of this server balanced, if it did.
    `cluster` is None when all ranks run on the front's host and it has no others; `single_host` says so of a cluster.
    `kv_replicas` are those of all pools of the server, and `sends_entries` says that another pool goes on from those of
    these ranks. `expert_load` returns the measured traffic, tokens
    `[moe layers, experts]`; `wake` makes the engine's loop look again at what is due; `epoch` is one that no plan of
    this server has yet exceeded, `weights` are those in force, and `weights_record` has their record, if it outlives
    this front. `log` takes lines for whoever starts the server.
    """

    def __init__(
        self,
        settings: Settings,
        model: PreparedModel,
        executor: RankExecutor,
        log: Callable[[str], None],
        *,
        events: EventLog,
        expert_load: Callable[[], np.ndarray],
        wake: Callable[[], None],
        cluster: Cluster | None = None,
        single_host: bool | None = None,
        kv_replicas: KVReplicas | None = None,
        sends_entries: bool = False,
        host: str = LOOPBACK,
        epoch: int = -1,
        placement: Path | None = None,
        weights: WeightsVersion = FIRST_WEIGHTS,
        weights_record: WeightsRecord | None = None,
    ) -> None:
        self.model = model
        """The model that the server was started with."""
        self.weights_record = weights_record or WeightsRecord(None, model.content)
        self.single_host = cluster is None if single_host is None else single_host
        """Whether all ranks run on the front's host."""
        self._executor = executor
        self._log = log
        self._events = events
        self.plans = plans = PlanCatalog.of_server(settings, model, cluster, placement, log)
        self.kv_replicas = replicas = kv_replicas or KVReplicas.of_server(
            settings, model, plans.base.pages_per_rank, single_host=self.single_host
        )
        self.parity = ExpertParity(executor, settings.parity, self._on_parity_event)
        self._rendezvous = rendezvous = Rendezvous(executor, host, self._on_coordinator_exit)
        effects = Effects(events, replicas, self.parity, rendezvous.forget)
        membership = Membership(
            restart=settings.restart, epoch=epoch, weights=weights, next_weights=weights, adopting_weights=weights
        )
        self.state = state = RecoveryState(membership, effects.execute, wake)
        self.meshes = meshes = MeshPool(executor, state, log)
        self.adoption = adoption = Adoption(
            settings, executor, plans, state, replicas, self.parity, expert_load, sharded_layers=model.sharded_layers
        )
        self.preparation = preparation = MeshPreparation(plans, meshes, state, adoption, depth=settings.lattice_depth)
        self.joining = joining = Joining(executor, rendezvous, plans, state, preparation)
        self.generations = Generations(executor, rendezvous, plans, state, meshes, adoption, preparation, joining)
        configuration = RankConfiguration(
            settings, model, executor, plans, replicas, state, single_host=self.single_host
        )
        self.rank_start = RankStart(executor, configuration, state, meshes, timeout_s=settings.start_timeout_s)
        self.take_over = TakeOver(
            executor,
            state,
            meshes,
            self.generations,
            self.rank_start,
            log,
            keeps_pages=lambda rank: settings.tensor == 1 and (not sends_entries or replicas.is_reopened(rank)),
        )
        self._first_start = FirstStart(
            executor, plans, meshes, adoption, preparation, self.generations, self.rank_start, log
        )

    # -- Queries ------------------------------------------------------------------------------------------------

    @property
    def membership(self) -> Membership:
        """The ranks now."""
        return self.state.membership

    @property
    def plan(self) -> Plan | None:
        """The plan in force."""
        return self.membership.plan

    @property
    def epoch(self) -> int:
        """The number of the plan adopted last."""
        return self.membership.epoch

    @property
    def plan_ranks(self) -> tuple[int, ...]:
        """The ranks of the plan in force, those lost since it was adopted among them."""
        return self.membership.plan_ranks

    @property
    def settled_plan(self) -> Plan | None:
        """The plan in force, if the ranks can hold no more of the desired one now."""
        return None if self.membership.next_part is not None or self.membership.comm_broken else self.plan

    @property
    def spare_ids(self) -> int:
        """Replacements that the running generation has process ids for."""
        return self._rendezvous.spare_count

    @property
    def coordinator_pid(self) -> int | None:
        """The process that hosts the coordination service of this generation."""
        service = self._rendezvous.coordinator
        return service.process.pid if service is not None else None

    # -- Start --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take over the ranks of an earlier front, or start all ranks under the base plan, with every single loss
        prepared; deeper losses are prepared beside the steps. Raises StartError naming the rank."""
        for warning in self.plans.warnings():
            self._log(warning)
        if not await self.take_over.run():
            await self._first_start.run()

    # -- Losses -------------------------------------------------------------------------------------------------

    def on_rank_lost(self, loss: Loss) -> None:
        """A rank died, or was declared dead: the engine's loop recovers from it."""
        self.state.record(Lost(loss))

    def on_rank_starved(self, rank: int, evidence: str) -> None:
        """A rank is late, and not fenced, because its process waits for a processor."""
        self._events.emit(EventKind.STARVED, self.epoch, rank=rank, cause=evidence)

    async def recover(self, lost: Callable[[], set[int]], pages_used: Callable[[], dict[int, int]]) -> dict[str, float]:
        """Go on without the ranks that `lost` returns; it is called again at each turn, since more may die meanwhile.
        Returns milliseconds by phase. Raises NoCapacity when the ranks left cannot serve: they wait for others."""
        phases = PhaseTimes()
        while True:
            with phases.measure("fence"):
                dead = lost()
                survivors = [rank for rank in self.plan_ranks if rank not in dead]
                await asyncio.gather(*(self._executor.fenced(rank) for rank in self.plan_ranks if rank in dead))
                self._executor.abort(survivors, self.epoch)
            with phases.measure("plan"):
                try:
                    plan = self.plans.of(survivors)
                except NoCapacity as error:
                    self.generations.suspend(survivors, str(error))
                    raise
            try:
                if self.membership.comm_broken:
                    await self.generations.start(survivors, pages_used(), phases)
                else:
                    await self._switch_to(plan, phases)
                    self.preparation.prepare_ahead()
                return phases
            except RankLost:
                continue
            except (CommandFailed, TimeoutError):
                self.mark_comm_broken()

    async def release(self, ranks: Collection[int]) -> dict[str, float]:
        """Go on without these ranks, which have no requests any more, between two steps. Returns milliseconds by phase.
        Raises RankLost, CommandFailed or TimeoutError, after which a recovery is due."""
        phases = PhaseTimes()
        with phases.measure("plan"):
            plan = self.plans.of([rank for rank in self.plan_ranks if rank not in ranks])
        await self._switch_to(plan, phases)
        self.preparation.prepare_ahead()
        return phases

    def mark_comm_broken(self) -> None:
        """The communicators of this generation cannot be trusted any more."""
        self.state.record(CommBroken())

    def mark_exchange_failed(self) -> None:
        """An exchange between ranks that live has failed: they connect again. Where ranks share memory the mesh is
        connected again in this generation; XLA keeps the connections of a generation, so that others form a new one."""
        if self.meshes.shares_memory:
            self.state.record(ExchangeFailed())
        else:
            self.mark_comm_broken()

    async def close(self) -> None:
        """Stop the coordination service and the background tasks; free the KV replicas, and the folders of weights that
        nothing after this front needs."""
        self.generations.stop_preparing()
        await self._rendezvous.close()
        self.kv_replicas.close()
        self.weights_record.versions.close()

    async def _switch_to(self, plan: Plan, phases: PhaseTimes) -> None:
        with phases.measure("adopt"):
            await self.preparation.ensure_connected(MeshKey.of(plan))
            await self.adoption.adopt_available(plan)

    def _on_coordinator_exit(self, how: str) -> None:
        """The next replacement needs a new generation. Where ranks do not share memory this generation cannot connect
        another mesh either, and a new one is due at once."""
        if not self.meshes.shares_memory:
            self.mark_comm_broken()
        self._events.emit(EventKind.COORDINATOR_LOST, self.epoch, cause=how)

    # -- Ranks that join ----------------------------------------------------------------------------------------

    async def expand(self) -> dict[str, float]:
        """Put the plan with the JOINED ranks into force. Returns milliseconds by phase. Raises RankLost or
        CommandFailed when that failed; the plan in force is then adopted once more, unless that raised this error. It
        has the JOINED ranks already if a part of the plan had come into force."""
        phases = PhaseTimes()
        with phases.measure("adopt"):
            try:
                plan = self.plans.of(self.membership.members)
                await self.adoption.adopt(plan, plan)
            except (RankLost, CommandFailed):
                plan = self.plans.of(self.plan_ranks)
                await self.adoption.adopt(plan, plan)
                raise
        self.preparation.prepare_ahead()
        return phases

    def _on_parity_event(self, kind: EventKind, message: str) -> None:
        self._events.emit(kind, self.epoch, message=message)
