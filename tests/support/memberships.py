"""Plans and losses of a few ranks, for tests of what becomes of ranks."""

from collections.abc import Collection

from planner.plan.plan import Plan, PlannedRank
from serving.executor.failure_detector import Cause
from serving.executor.incarnation import Loss
from serving.executor.mesh_key import MeshKey


def plan_of(ranks: Collection[int], epoch: int = 0) -> Plan:
    """A plan that puts expert 0 of one layer on each of these ranks."""
    placed = tuple(PlannedRank(id=rank, host=f"host{rank}") for rank in sorted(ranks))
    return Plan(epoch=epoch, ranks=placed, slots_per_rank=1, slots=((0,) * len(placed),), experts=1)


def mesh_of(ranks: Collection[int]) -> MeshKey:
    """The mesh of the plan of these ranks."""
    return MeshKey.of(plan_of(ranks))


def loss_of(rank: int) -> Loss:
    """The loss of a rank whose process ended."""
    return Loss(rank, Cause("exited", "it is to"), 1.0, 2.0)
