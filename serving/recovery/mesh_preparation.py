"""Prepares the meshes of the likeliest next plans ahead: their executables are loaded beside the steps, their
communicators connected between steps."""

from collections.abc import Collection

from serving.executor.mesh_key import MeshKey
from serving.recovery.adoption import Adoption
from serving.recovery.mesh_pool import MeshPool
from serving.recovery.plan_catalog import PlanCatalog
from serving.recovery.recovery_state import RecoveryState


class MeshPreparation:
    """The meshes of one server that are prepared for the losses of up to `depth` ranks, and for the ranks that have
    JOINED."""

    def __init__(
        self, plans: PlanCatalog, meshes: MeshPool, state: RecoveryState, adoption: Adoption, *, depth: int
    ) -> None:
        self._plans = plans
        self._meshes = meshes
        self._state = state
        self._adoption = adoption
        self._depth = depth

    def is_prepared(self, ranks: Collection[int]) -> bool:
        """Whether the mesh of these ranks, and that of every single loss of it, is connected."""
        wanted = (MeshKey.of(self._plans.of(ranks)), *self._meshes_after_losses(ranks, 1))
        return self._state.membership.connected.issuperset(wanted)

    def is_prepared_without(self, ranks: Collection[int]) -> bool:
        """Whether the mesh of the serving ranks without these is connected."""
        membership = self._state.membership
        left = [rank for rank in membership.plan_ranks if rank not in ranks]
        return not self._plans.why_infeasible(left) and MeshKey.of(self._plans.of(left)) in membership.connected

    def prepared_losses(self) -> list[int]:
        """The serving ranks whose single loss has a connected mesh in the lattice."""
        serving, connected = self._state.membership.plan_ranks, self._state.membership.connected
        plans = {rank: self._plans.in_lattice(set(serving) - {rank}) for rank in serving}
        return [rank for rank, plan in plans.items() if plan and MeshKey.of(plan) in connected]

    def coverage(self) -> dict[str, float]:
        """The share of connected meshes among those for the losses of 1, 2, ... ranks that the plan in force can
        survive: {"1 rank": 1.0, "2 ranks": 0.5}."""
        serving, connected = self._state.membership.plan_ranks, self._state.membership.connected
        if not serving:
            return {}
        losses: dict[int, list[bool]] = {}
        for key in self._meshes_after_losses(serving, self._depth):
            losses.setdefault(len(serving) - len(key.ranks), []).append(key in connected)
        return {f"{n} rank{'s' if n > 1 else ''}": sum(ok) / len(ok) for n, ok in sorted(losses.items())}

    def start_meshes(self) -> tuple[list[MeshKey], list[MeshKey]]:
        """The meshes that a server compiles before it serves, and those of them that it also connects: the base plan's
        and those of every single loss."""
        base = MeshKey.of(self._plans.base)
        ranks = self._plans.base.rank_ids
        return (
            [base, *self._meshes_after_losses(ranks, self._depth)],
            [base, *self._meshes_after_losses(ranks, 1)],
        )

    def prepare_ahead(self) -> None:
        """Load the executables of the next losses, and of the plan with the JOINED ranks, beside the steps;
        `connect_next` finishes each mesh."""
        membership = self._state.membership
        if membership.service_lost or membership.plan is None:
            self._meshes.stop()
            return
        members = membership.members
        wanted = self._meshes_after_losses(membership.plan_ranks, 1)
        if membership.joined:
            wanted.append(MeshKey.of(self._plans.of(members)))
        wanted += self._meshes_after_losses(members, self._depth)
        missing = [key for key in dict.fromkeys(wanted) if key not in membership.connected]
        self._meshes.load_ahead(MeshKey.of(membership.plan), missing)

    async def connect_next(self) -> bool:
        """Connect one mesh that is loaded, between two steps. True when nothing is left to be prepared. Raises
        RankLost, CommandFailed or TimeoutError."""
        key = self._meshes.take_loaded()
        if set(key.ranks) <= set(self._state.membership.members):
            await self.connect(key)
        return self._meshes.idle

    async def ensure_connected(self, key: MeshKey) -> None:
        """Compile, load and connect a mesh now, unless it was prepared. Raises as `connect_next` does."""
        if key not in self._state.membership.connected:
            await self._meshes.build(key)
            await self.connect(key)

    async def connect(self, key: MeshKey) -> None:
        """Connect a mesh that is loaded. Raises as `connect_next` does."""
        warm = all(
            self._adoption.loaded_shape(rank) == (key.has_attention(rank), key.slots_of(rank)) for rank in key.ranks
        )
        await self._meshes.connect(key, self._state.membership.epoch, warm=warm)

    def _meshes_after_losses(self, ranks: Collection[int], depth: int) -> list[MeshKey]:
        return self._plans.meshes_after_losses(ranks, min(depth, len(ranks) - 1))
