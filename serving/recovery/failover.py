"""Keeps a set of ranks serving under a plan: the start, losses, new generations, and ranks that join.

Every stage may be cut short by another loss: it is then done again without all ranks lost until then
(docs/decisions/0003).
"""

import asyncio
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import PlannerError
from planner.inputs.cluster import Cluster
from planner.plan.plan import Plan
from serving.config import Settings
from serving.errors import NoCapacity, StartError
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause
from serving.executor.incarnation import Loss
from serving.executor.mesh_key import MeshKey
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.launch.coordinator import LOOPBACK
from serving.launch.weights_record import WeightsRecord
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.events import EventKind, EventLog
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.weights import FIRST_WEIGHTS, WeightsVersion
from serving.recovery.adoption import Adoption, weights_message
from serving.recovery.expert_parity import ExpertParity
from serving.recovery.generations import Generations
from serving.recovery.joining import Joining
from serving.recovery.kv_replicas import KVReplicas
from serving.recovery.membership import Membership
from serving.recovery.membership_events import (
    CommBroken,
    DropParity,
    DropRank,
    Effect,
    ExchangeFailed,
    Lost,
    Ready,
    Report,
    ReportWeights,
    Suspended,
)
from serving.recovery.mesh_pool import MeshPool
from serving.recovery.mesh_preparation import MeshPreparation
from serving.recovery.phase_times import PhaseTimes
from serving.recovery.plan_catalog import PlanCatalog
from serving.recovery.rank_configuration import RankConfiguration
from serving.recovery.recovery_state import RecoveryState
from serving.recovery.rendezvous import Rendezvous
from serving.recovery.take_over import TakeOver

STATES_NOT_KEPT = (
    "{name} has layers whose context is a state: no replica of it and no prefix of ended prompts is kept, and nothing "
    "is drafted. Requests of a lost rank are computed again from their tokens; a drain moves their states."
)
"""The line for whoever serves a model of which a part of the cache cannot be replicated or shared."""


class Failover:
    """The ranks of one server, and what happens when one is lost or joins. Its methods are called by one task at a
    time, the engine's loop; only `start_rank` runs beside them, and `on_rank_lost` whenever a rank is lost.

    `placement` is the file of the base plan that an earlier front of this server balanced, if it did.
    `cluster` is None when all ranks run on the front's host. `expert_load` returns the measured traffic, tokens
    `[moe layers, experts]`; `wake` makes the engine's loop look again at what is due; `epoch` is one that no plan of
    this server has yet exceeded, `weights` are those in force, and
    `weights_record` has their record, if it outlives this front.
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
        host: str = LOOPBACK,
        epoch: int = -1,
        placement: Path | None = None,
        weights: WeightsVersion = FIRST_WEIGHTS,
        weights_record: WeightsRecord | None = None,
    ) -> None:
        self._executor = executor
        self._log = log
        self._events = events
        self._start_timeout_s = settings.start_timeout_s
        single_host = cluster is None
        hosts = [settings.host_of(rank) for rank in range(settings.ranks)]
        self.config: Mapping[str, Any] = json.loads(model.config)
        """The model's configuration, as a rank gets it."""
        self.model = model
        """The model that the server was started with."""
        self.weights_record = weights_record or WeightsRecord(None, model.content)
        self.single_host = single_host
        """Whether all ranks run on the front's host."""
        self.plans = PlanCatalog(settings, model, cluster or Cluster.local(settings.ranks, hosts=hosts))
        self.placement = placement
        if placement is not None and placement.exists():
            self._take_placement(placement)
        membership = Membership(
            restart=settings.restart, epoch=epoch, weights=weights, next_weights=weights, adopting_weights=weights
        )
        self.state = RecoveryState(membership, self._execute, wake)
        self.meshes = MeshPool(executor, self.state, log)
        self._rendezvous = Rendezvous(executor, host, self._on_coordinator_exit)
        self.kv_replicas = KVReplicas.create(
            _kv_replication(settings, model, single_host=single_host),
            settings.ranks,
            reason=STATES_NOT_KEPT.format(name=model.name) if model.state_bytes else "",
            entries=self.plans.base.pages_per_rank * settings.page_size,
            entry_bytes=model.cache_bytes_per_token // settings.tensor,
            tensor=settings.tensor,
        )
        self.parity = ExpertParity(executor, settings.parity, self._on_parity_event)
        self.adoption = Adoption(
            settings,
            executor,
            self.plans,
            self.state,
            self.kv_replicas,
            self.parity,
            expert_load,
            sharded_layers=model.sharded_layers,
        )
        self.preparation = MeshPreparation(
            self.plans, self.meshes, self.state, self.adoption, depth=settings.lattice_depth
        )
        self.joining = Joining(executor, self._rendezvous, self.plans, self.state, self.preparation)
        self.generations = Generations(
            executor,
            self._rendezvous,
            self.plans,
            self.state,
            self.meshes,
            self.adoption,
            self.preparation,
            self.joining,
        )
        self._configuration = RankConfiguration(
            settings, model, executor, self.plans, self.kv_replicas, self.state, single_host=single_host
        )
        self.take_over = TakeOver(self, executor, log, keep_pages=settings.tensor == 1)

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

    def _take_placement(self, file: Path) -> None:
        """Use the base plan of an earlier front. Raises StartError when the file is no plan."""
        try:
            taken = self.plans.place(Plan.from_json(file.read_text()))
        except (OSError, PlannerError) as error:
            raise StartError(f"the placement in {file} cannot be read: {error} Remove the file.") from None
        if not taken:
            self._log("the placement of an earlier front is not one of these ranks and this model: it is not used")

    async def start(self) -> None:
        """Start all ranks under the base plan, with every single loss prepared; deeper losses are prepared beside the
        steps. Raises StartError naming the rank."""
        for warning in self.plans.warnings():
            self._log(warning)
        if await self.take_over.run():
            return
        try:
            await self._start_ranks(self.plans.base.rank_ids)
        except (RankLost, CommandFailed) as error:
            incarnation = self._executor.get(error.rank)
            output = incarnation.process.last_output() if incarnation is not None else ""
            raise StartError(f"{str(error).removesuffix('.')}. Its last words: {output}") from None

    async def _start_ranks(self, ranks: tuple[int, ...]) -> None:
        self._log(f"starting {len(ranks)} ranks")
        for rank in ranks:
            self._executor.spawn(rank)
        await asyncio.gather(*(self.configure(rank) for rank in ranks))
        await self.generations.open(ranks, {})
        compiled, connected = self.preparation.start_meshes()
        await self.meshes.compile(compiled)
        self._log(f"loading and connecting {len(connected)} meshes")
        for key in connected:
            await self.meshes.load(key)
        await self.adoption.adopt(self.plans.base, self.plans.base)
        if self.adoption.unreadable:
            raise StartError(next(iter(self.adoption.unreadable.values())))
        for key in connected:
            await self.preparation.connect(key)
        self.generations.serve(ranks)

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
                    self.suspend(survivors, str(error))
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
        """Stop the coordination service and the background tasks; free the KV replicas."""
        self.generations.stop_preparing()
        await self._rendezvous.close()
        self.kv_replicas.close()

    async def _switch_to(self, plan: Plan, phases: PhaseTimes) -> None:
        with phases.measure("adopt"):
            await self.preparation.ensure_connected(MeshKey.of(plan))
            await self.adoption.adopt_available(plan)

    def suspend(self, ranks: Collection[int], reason: str) -> None:
        """No plan is in force: these ranks, and those on their way, wait for others and a new generation."""
        self.joining.cancel()
        self.state.record(Suspended(frozenset(ranks), reason))

    def _execute(self, effect: Effect) -> None:
        """Carry out an effect of a transition of the membership."""
        if isinstance(effect, Report):
            self._events.emit(effect.kind, self.epoch, rank=effect.rank, cause=effect.cause)
            return
        if isinstance(effect, ReportWeights):
            text = f"version {effect.version.label}, from {effect.version.model}"
            phases = {"adopt": 1e3 * effect.seconds}
            self._events.emit(EventKind.WEIGHTS_SWITCHED, self.epoch, message=text, phases=phases)
            return
        if isinstance(effect, DropParity):
            self.parity.forget_all()
            return
        self.kv_replicas.retire(effect.rank)
        if isinstance(effect, DropRank):
            self._rendezvous.forget(effect.rank)
            self.parity.forget(effect.rank)

    def _on_coordinator_exit(self, how: str) -> None:
        """The next replacement needs a new generation. Where ranks do not share memory this generation cannot connect
        another mesh either, and a new one is due at once."""
        if not self.meshes.shares_memory:
            self.mark_comm_broken()
        self._events.emit(EventKind.COORDINATOR_LOST, self.epoch, cause=how)

    # -- Ranks that join ----------------------------------------------------------------------------------------

    async def start_rank(self, rank: int) -> None:
        """Start the process of a rank until it is READY. A rank that is not within the time that a server has to start
        is lost. Raises RankLost or CommandFailed."""
        self._executor.spawn(rank)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                version = self.membership.next_weights
                await self.configure(rank)
                while version != self.membership.next_weights:  # decided on meanwhile: no step shall wait for them
                    version = self.membership.next_weights
                    await self.stage_weights(rank, version)
            self._executor.monitor(rank)
        except TimeoutError:
            cause = Cause("error", f"not ready within {self._start_timeout_s:g} s")
            self._executor.declare(rank, cause, clock.now())
            raise RankLost(rank, str(cause)) from None
        self.state.record(Ready(rank))

    async def expand(self) -> dict[str, float]:
        """Put the plan with the JOINED ranks into force. Returns milliseconds by phase. Raises RankLost or
        CommandFailed when that failed; the plan before is in force again, unless its adoption raised this error."""
        phases = PhaseTimes()
        before = self.plan_ranks
        with phases.measure("adopt"):
            try:
                plan = self.plans.of(self.membership.members)
                await self.adoption.adopt(plan, plan)
            except (RankLost, CommandFailed):
                plan = self.plans.of(before)
                await self.adoption.adopt(plan, plan)
                raise
        self.preparation.prepare_ahead()
        return phases

    async def configure(self, rank: int) -> link_pb2.Held:
        """Wait until a rank has attached, and configure it. Returns what it holds of an earlier front. Raises RankLost
        or CommandFailed."""
        answer = await self._configuration.configure(rank)
        self.meshes.shares_memory = answer.shares_memory
        return answer.held

    async def stage_weights(self, rank: int, version: WeightsVersion) -> None:
        """Have a rank load other weights into host memory, beside its steps; for the version that it has, drop what it
        has staged. Raises RankLost or CommandFailed."""
        message = weights_message(version, self._executor.host_paths(rank))
        await self._executor.call(rank, "stage_weights", link_pb2.StageWeights(version=message))

    def _on_parity_event(self, kind: EventKind, message: str) -> None:
        self._events.emit(kind, self.epoch, message=message)


def _kv_replication(settings: Settings, model: PreparedModel, *, single_host: bool) -> str:
    """Where replicas of the caches are kept, as `auto` is resolved so far. Raises StartError where they are asked for
    and cannot be kept."""
    wanted = settings.kv_replication
    if model.state_bytes and wanted in ("memory", "stream"):
        raise StartError(
            f"kv_replication is {wanted!r}, but {model.name} has layers whose context is a state, of which no replica "
            "is kept yet. Leave it out: requests of a lost rank are computed again from their tokens."
        )
    return "off" if model.state_bytes or (wanted == "auto" and not single_host) else wanted
