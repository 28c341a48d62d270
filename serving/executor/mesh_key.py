"""What names a mesh between front and ranks: which ranks, in what order and roles, and the slots on each."""

from typing import NamedTuple, Self

from planner.plan import Plan
from serving.proto.moejax.v1 import link_pb2


class MeshKey(NamedTuple):
    """`ranks` in mesh order, `slots` on each that holds experts. Of `attention` more than 0, the first so many ranks
    attend and the others hold experts; of 0, each does both."""

    ranks: tuple[int, ...]
    slots: int
    attention: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The mesh of a plan."""
        apart = not set(plan.source_ids).intersection(plan.holder_ids)
        ranks = plan.source_ids + plan.holder_ids if apart else plan.rank_ids
        return cls(ranks, plan.slots_per_rank, len(plan.source_ids) if apart else 0)

    @classmethod
    def read(cls, mesh: link_pb2.MeshShape) -> Self:
        """The mesh a message names."""
        return cls(tuple(mesh.ranks), mesh.slots, mesh.attention)

    def message(self) -> link_pb2.MeshShape:
        """The same as a message."""
        return link_pb2.MeshShape(ranks=self.ranks, slots=self.slots, attention=self.attention)

    @property
    def holders(self) -> tuple[int, ...]:
        """The ranks that hold experts."""
        return self.ranks[self.attention :]

    def slots_of(self, rank: int) -> int:
        """The slots on a rank."""
        return self.slots if rank in self.holders else 0

    def attends(self, rank: int) -> bool:
        """Whether the rank has a cache, and all weights but experts."""
        return not self.attention or rank in self.ranks[: self.attention]
