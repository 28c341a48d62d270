"""The name of a mesh between front and ranks: its ranks, their order and roles, and the slots on each."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple, Self

from planner.plan.plan import Plan
from serving.proto.moejax.v1 import link_pb2

MANY_RANKS = 64
"""Above so many ranks a message names runs of consecutive ranks: its size follows the number of ranks that are missing,
and not that of those which are there. Fronts and ranks of version 1 of the link have never had more."""


class MeshKey(NamedTuple):
    """A mesh of `ranks`, in mesh order, with `slots` on each that holds experts. With `attention` above 0 the first so
    many are attention ranks and the others expert ranks; with 0 each rank is both."""

    ranks: tuple[int, ...]
    slots: int
    attention: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The mesh of a plan."""
        apart = not set(plan.attention_rank_ids).intersection(plan.expert_rank_ids)
        ranks = plan.attention_rank_ids + plan.expert_rank_ids if apart else plan.rank_ids
        return cls(ranks, plan.slots_per_rank, len(plan.attention_rank_ids) if apart else 0)

    @classmethod
    def read(cls, mesh: link_pb2.MeshShape) -> Self:
        """The mesh that a message names."""
        ranks = tuple(mesh.ranks) or _ranks_of(mesh.runs)
        return cls(ranks, mesh.slots, mesh.attention)

    def message(self) -> link_pb2.MeshShape:
        """The message that names this mesh."""
        if len(self.ranks) <= MANY_RANKS:
            return link_pb2.MeshShape(ranks=self.ranks, slots=self.slots, attention=self.attention)
        return link_pb2.MeshShape(runs=_runs_of(self.ranks), slots=self.slots, attention=self.attention)

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """The ranks that hold experts."""
        return self.ranks[self.attention :]

    def slots_of(self, rank: int) -> int:
        """The number of slots on a rank."""
        return self.slots if rank in self.expert_ranks else 0

    def has_attention(self, rank: int) -> bool:
        """Whether a rank has a KV cache, and all weights but experts."""
        return not self.attention or rank in self.ranks[: self.attention]


def _runs_of(ranks: tuple[int, ...]) -> list[int]:
    """First and count of each run of consecutive ranks, in the order of `ranks`."""
    runs: list[int] = []
    for rank in ranks:
        if runs and rank == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += (rank, 1)
    return runs


def _ranks_of(runs: Iterable[int]) -> tuple[int, ...]:
    """The ranks of which `_runs_of` made the runs."""
    pairs = zip(*[iter(runs)] * 2, strict=True)
    return tuple(itertools.chain.from_iterable(range(first, first + count) for first, count in pairs))
