"""Puts a plan into force on its ranks, and converges it to the desired plan beside the steps.

The plan in force may be a part of the desired one: some slots are empty while their experts are being loaded.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

from planner.plan.plan import Plan
from serving.config import Settings
from serving.errors import NoCapacity
from serving.executor.executor import RankExecutor
from serving.executor.mesh_key import MeshKey
from serving.launch.host_pool import with_current_hosts
from serving.launch.rank_process import HostPaths
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.weights import WeightsVersion
from serving.recovery.expert_moves import next_moves
from serving.recovery.expert_parity import ExpertParity
from serving.recovery.kv_replicas import KVReplicas
from serving.recovery.lost_experts import Slot, held_part, lost_share, may_serve, next_part, without_slots
from serving.recovery.membership_events import Adopted, AdoptionBegan, InvalidatedTaken, PartPlanned
from serving.recovery.plan_catalog import PlanCatalog
from serving.recovery.recovery_state import RecoveryState

RECONCILE_SLOTS = 2
"""Slots that each rank loads at a time while steps go on."""


class Adoption:
    """The plan in force, and how it changes. `expert_load` returns the measured traffic, tokens
    `[moe layers, experts]`; `sharded_layers` are MoE layers whose experts are shards of a dense layer, none of which
    is ever masked (docs/decisions/0014)."""

    def __init__(
        self,
        settings: Settings,
        executor: RankExecutor,
        plans: PlanCatalog,
        state: RecoveryState,
        kv_replicas: KVReplicas,
        parity: ExpertParity,
        expert_load: Callable[[], np.ndarray],
        *,
        sharded_layers: Iterable[int] = (),
    ) -> None:
        self._settings = settings
        self._executor = executor
        self._plans = plans
        self._state = state
        self._kv_replicas = kv_replicas
        self._parity = parity
        self._expert_load = expert_load
        self._sharded_layers = frozenset(sharded_layers)
        self.unreadable: dict[tuple[int, int], str] = {}
        """(MoE layer, expert) that the store could not give, and why."""
        self.experts_loaded = 0

    # -- Queries ------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The plan in force."""
        return self._state.membership.plan

    @property
    def reconciling(self) -> bool:
        """True while experts are missing from the plan in force that can be loaded."""
        return self._state.membership.next_part is not None

    @property
    def can_step(self) -> bool:
        """True when a plan is in force that has every shard of sharded dense layers: each token needs all of them."""
        return self.plan is not None and not self._missing_shards(self.plan)

    def lost_share(self, plan: Plan) -> float:
        """The share of measured traffic that the experts had which a plan masks."""
        return lost_share(plan, self.routed_load())

    def routed_load(self) -> np.ndarray:
        """Measured traffic of the routers `[moe layers, experts]`: even while there is none, 0 in sharded layers."""
        load = np.array(self._expert_load(), float)
        return self._of_routers(load if load.any() else np.ones_like(load))

    def routed_tokens(self) -> np.ndarray:
        """Tokens that the routers have sent so far, `[moe layers, experts]`: 0 in sharded layers."""
        return self._of_routers(np.array(self._expert_load(), float))

    def _of_routers(self, load: np.ndarray) -> np.ndarray:
        load[sorted(self._sharded_layers)] = 0.0
        return load

    def affected_by(self, leaving: Collection[int]) -> set[int]:
        """The serving ranks whose requests must move before `leaving` can go: these ranks, and ranks that are in
        another tensor group afterwards."""
        if self.plan is None:
            return set(leaving)
        try:
            after = self._plans.of(set(self._state.membership.plan_ranks).difference(leaving)).groups
        except NoCapacity:
            after = {}
        return {rank for rank, group in self.plan.groups.items() if after.get(rank) != group} | set(leaving)

    def tp_peers(self, rank: int) -> tuple[int, ...]:
        """The tensor group of a rank in the plan in force; the rank alone if it is in none."""
        return self.plan.groups.get(rank, (rank,)) if self.plan is not None else (rank,)

    def kv_locations(self, rank: int, pages: Iterable[int]) -> list[tuple[int, list[int]]]:
        """The (rank, pages) that hold the KV entries of a request of `rank` with these pages, one for each shard of the
        heads. A rank of a tensor group has the pages of its members one after the other
        (`moejax.model.tensor_parallel`)."""
        group, pages = self.tp_peers(rank), list(pages)
        first = group.index(rank) * self._plans.base.pages_per_rank
        return [(peer, [first + page for page in pages]) for peer in group]

    def loaded_shape(self, rank: int) -> tuple[bool, int]:
        """Whether a rank has loaded the weights of attention, and the number of slots it has buffers for."""
        membership = self._state.membership
        if rank in membership.joined or self.plan is None:
            return MeshKey.of(self._plans.base).has_attention(rank), membership.joined_slots.get(rank, 0)
        key = MeshKey.of(self.plan)
        return key.has_attention(rank), key.slots_of(rank)

    # -- Changes ------------------------------------------------------------------------------------------------

    async def adopt(self, plan: Plan, desired: Plan) -> None:
        """Put `plan`, which is `desired` or a part of it, into force as a new epoch. Experts that the store cannot give
        are left out of it. Raises RankLost or CommandFailed."""
        while missing := await self._adopt_once(plan, desired):
            plan = without_slots(plan, missing)
        self._plan_next_part()

    async def adopt_available(self, desired: Plan) -> None:
        """Put the part of `desired` into force that its ranks hold already, if the policy for lost experts allows the
        rest to be loaded beside the steps; else all of it. Raises RankLost or CommandFailed."""
        assert self.plan is not None
        part, settings = held_part(desired, self.plan), self._settings
        all_slots = desired.moe_layers * desired.slots_per_rank
        moved = {at for at, source in self._parity.sources(self.plan, desired).items() if source.group is None}
        # No rank has lost an expert that only moves, and no step can run without a missing shard.
        first = moved | self._missing_shards(part)
        if first:
            part = next_part(part, desired, all_slots, only=first)
        if not may_serve(part, settings.on_lost_expert, self.routed_load(), settings.lost_expert_bound):
            part = next_part(part, desired, all_slots, excluding=self._unobtainable(desired))
        await self.adopt(part, desired)

    async def adopt_weights(self) -> None:
        """Put the plan in force into force once more, with the weights that were decided on. Raises RankLost or
        CommandFailed."""
        plan, desired = self.plan, self._state.membership.desired
        assert plan is not None
        await self.adopt(plan, desired if desired is not None else plan)

    async def reload_damaged(self, damaged: Collection[Slot]) -> None:
        """Empty these slots, and load their experts again. Raises RankLost or CommandFailed."""
        assert self.plan is not None
        slots, expert_ranks = self.plan.slots_per_rank, self.plan.expert_rank_ids
        here = [(rank, layer, slot) for rank, layer, slot in damaged if rank in expert_ranks and slot < slots]
        desired = self._plans.of(self.plan.rank_ids)
        self._state.record(Adopted(without_slots(self.plan, here), desired))
        await self.adopt_available(desired)

    def converge_to(self, desired: Plan) -> None:
        """Move experts beside the steps until the plan in force, of the same ranks, is `desired`."""
        assert self.plan is not None
        self._state.record(Adopted(self.plan, desired))
        self._plan_next_part()

    async def reconcile(self) -> None:
        """Load some of the experts that the plan in force misses. Raises RankLost or CommandFailed."""
        membership = self._state.membership
        if membership.next_part is not None and membership.desired is not None:
            await self.adopt(membership.next_part, membership.desired)

    def retry_unreadable(self) -> None:
        """Ask the store again for the experts that it could not give."""
        self.unreadable.clear()
        self._plan_next_part()

    def take_invalidated(self) -> frozenset[int]:
        """The ranks whose caches were invalidated since the last call."""
        taken = self._state.membership.invalidated
        self._state.record(InvalidatedTaken())
        return taken

    def _plan_next_part(self) -> None:
        plan, desired, part = self.plan, self._state.membership.desired, None
        if plan is not None and desired is not None and plan.slots != desired.slots:
            excluded = self._unobtainable(desired)
            part = next_part(plan, desired, RECONCILE_SLOTS, excluding=excluded)
            if part.slots == plan.slots:
                part = next_moves(plan, desired, RECONCILE_SLOTS, excluding=excluded)
        self._state.record(PartPlanned(part))

    def _missing_shards(self, plan: Plan) -> set[tuple[int, int]]:
        """The shards of sharded dense layers, (layer, shard), that a plan has in no slot."""
        return {(layer, shard) for layer, shard in plan.masked if layer in self._sharded_layers}

    def _unobtainable(self, plan: Plan) -> set[tuple[int, int]]:
        """The experts that neither the store nor parity can give to the ranks of a plan."""
        return self.unreadable.keys() - self._parity.sources(self.plan, plan).keys()

    async def _adopt_once(self, plan: Plan, desired: Plan) -> list[Slot]:
        """Put a plan into force as a new epoch. Returns the slots whose experts the store could not give."""
        plan = with_current_hosts(plan.with_epoch(self._state.membership.epoch + 1), self._plans.cluster)
        self._state.record(AdoptionBegan(plan))
        self._kv_replicas.set_groups(plan.groups)
        messages = self._messages(plan)
        membership = self._state.membership
        if membership.adopting_weights == membership.weights:  # else ranks hold experts of two versions
            await self._parity.supply(self.plan, plan)
        answers = await self._executor.call_all("adopt", messages)
        self.experts_loaded += sum(answer.experts_loaded for answer in answers)
        for answer in answers:
            self.unreadable |= {(slot.layer, slot.expert): answer.trouble for slot in answer.missing}
        by_rank = zip(plan.rank_ids, answers, strict=True)
        missing = [(rank, slot.layer, slot.slot) for rank, answer in by_rank for slot in answer.missing]
        self._state.record(Adopted(without_slots(plan, missing), desired))
        return missing

    def _messages(self, plan: Plan) -> dict[int, link_pb2.Adopt]:
        """The message that makes each rank adopt a plan."""
        routes = dict(zip(plan.attention_rank_ids, plan.expert_to_slot().astype(np.int32), strict=True))
        messages = {
            rank: link_pb2.Adopt(
                epoch=plan.epoch,
                mesh=MeshKey.of(plan).message(),
                slots=slots_of(plan, rank).tobytes(),
                expert_to_slot=routes[rank].tobytes() if rank in routes else b"",
                mates=self._tp_indices(plan, rank),
                weights=weights_message(self._state.membership.adopting_weights, self._executor.host_paths(rank)),
            )
            for rank in plan.rank_ids
        }
        for rank in plan.attention_rank_ids:
            if not self._kv_replicas.has(rank):
                on_front_host = self._executor.host_paths(rank) is None
                messages[rank].MergeFrom(self._kv_replicas.assign(rank, link_pb2.Adopt, on_front_host=on_front_host))
        return messages

    def _tp_indices(self, plan: Plan, rank: int) -> list[int]:
        """The indices in the mesh of a rank's tensor group; empty where heads are not sharded."""
        group = plan.groups.get(rank, ()) if self._settings.tensor > 1 else ()
        return [plan.rank_ids.index(peer) for peer in group]


def weights_message(version: WeightsVersion, host_paths: HostPaths | None) -> link_pb2.WeightsVersion:
    """The version of the weights for a rank on the front's host, or with these paths on another one."""
    assert host_paths is None or not version.number, "ranks on other hosts have the weights they were started with"
    return link_pb2.WeightsVersion(number=version.number, store=version.store)


def slots_of(plan: Plan, rank: int) -> np.ndarray:
    """The slots of a rank, int32 `[moe layers, slots]`; of a rank without experts `[moe layers, 0]`."""
    if rank not in plan.expert_rank_ids:
        return np.zeros((plan.moe_layers, 0), np.int32)
    return plan.slots_of(rank).astype(np.int32)
