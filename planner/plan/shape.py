"""The shape of a mesh before a placement: attention ranks in their tensor groups, and expert ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

POOLS = "pd"
"""The architecture of a plan of pools (`planner.plan.pools`), beside those of one mesh."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A mesh before its experts are placed.

    `roles` and `groups` have one entry per rank: its role, and the index of its tensor group of `tensor` ranks on one
    host (-1 for a rank without attention). Dense layers are sharded over `dense` ranks; a rank has `slots` slots.
    """

    arch: str
    tensor: int
    dense: int
    slots: int
    roles: tuple[str, ...]
    groups: tuple[int, ...]

    @cached_property
    def data(self) -> int:
        """Number of tensor groups, each with requests of its own."""
        return max(self.groups, default=-1) + 1

    @cached_property
    def expert_rank_count(self) -> int:
        """Number of ranks with experts."""
        return sum(role in ("collocated", "expert") for role in self.roles)

    @property
    def layout(self) -> tuple[int, tuple[str, ...]]:
        """The part of the shape that a placement depends on: slots and roles."""
        return self.slots, self.roles

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """Mesh axes and their sizes."""
        dense = (("dense", self.dense),) if self.dense != self.tensor else ()
        return (("data", self.data), ("tensor", self.tensor), *dense, ("expert", self.expert_rank_count))

    def describe(self) -> str:
        """One line: architecture, axes, slots, and the number of ranks with other roles."""
        axes = " x ".join(f"{name} {size}" for name, size in self.axes)
        idle = {role: self.roles.count(role) for role in ("attention", "expert", "standby")}
        others = "".join(f", {count} {role}" for role, count in idle.items() if count)
        return f"{self.arch} {axes}, {self.slots} slots{others}"
