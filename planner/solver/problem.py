"""The problem that `planner.solver.solve` makes a plan for, as one checked value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.errors import InputError
from planner.inputs.cluster import Cluster, Device
from planner.inputs.workload import Workload
from planner.plan.expert_loads import load_shares
from planner.plan.plan import ROLES, Plan
from planner.solver.roles import SWITCHES

PROTECTION = ("copies", "parity", "none")
LEAST = (("survive_ranks", 0), ("epoch", 0), ("pages_per_rank", 0), ("tensor", 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A model, a cluster, the ranks alive, and what their plan must provide.

    `alive` are ids of ranks, all of the cluster when None. `loads` is the traffic of each expert, float
    [moe_layers, experts] of any scale, even when None. `protect` says how single losses are survived without the store:
    by second copies, by parity groups, or not at all. `slots_per_rank`, `pages_per_rank` and `tensor` (ranks of a
    tensor group) are chosen when None, with slots enough to lose `survive_ranks` ranks.

    With `previous` the plan is the next one of a server that runs that plan: weights in place stay, and slots, pages,
    tensor groups and roles are those of `previous` where nothing else is asked. `roles` are the roles of ranks that are
    not collocated; `switch` says when a rank changes its role after a loss (`planner.solver.roles`). A fresh placement
    gives expert ranks traffic by their `speed`, float [expert ranks] with a mean of 1 (None: all the same).

    Raises InputError, naming the value, when a part is out of range or does not fit the model or the cluster.
    """

    workload: Workload
    cluster: Cluster
    alive: Collection[int] | None = None
    previous: Plan | None = None
    slots_per_rank: int | None = None
    survive_ranks: int = 1
    loads: np.ndarray | None = None
    epoch: int = 0
    pages_per_rank: int | None = None
    roles: Mapping[int, str] | None = None
    switch: str = "auto"
    protect: str = "copies"
    tensor: int | None = None
    speed: np.ndarray | None = None

    def __post_init__(self) -> None:
        slots = 1 if self.workload.experts else 0
        for name, least in (*LEAST, ("slots_per_rank", slots)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")
        for name, known in (("protect", PROTECTION), ("switch", SWITCHES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, none of {', '.join(known)}")
        for rank, role in (self.roles or {}).items():
            if role not in ROLES:
                raise InputError(f"rank {rank} has role {role!r}; roles are {', '.join(ROLES)}")
        model, before = self.workload, self.previous
        if before is not None and (before.moe_layers, before.experts) != (model.moe_layers, model.experts):
            raise InputError(
                f"the previous plan has {before.moe_layers} layers x {before.experts} experts, "
                f"the model {model.moe_layers} x {model.experts}"
            )
        _ = self.load_shares, self.devices  # checks both

    @cached_property
    def load_shares(self) -> np.ndarray:
        """Each expert's share of its layer's traffic, float [moe_layers, experts]."""
        return load_shares(self.loads, self.workload)

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the ranks alive, by ascending id."""
        return self.cluster.alive(self.alive)

    @property
    def tensor_width(self) -> int:
        """Ranks of a tensor group: as asked, as in the previous plan, or 1."""
        if self.tensor is not None:
            return self.tensor
        return dict(self.previous.axes).get("tensor", 1) if self.previous else 1

    def after_loss(self, plan: Plan, alive: Collection[int]) -> Problem:
        """The problem of the next plan of a server that runs `plan`, once only the ranks `alive` are left."""
        return Problem(
            workload=self.workload,
            cluster=self.cluster,
            alive=alive,
            previous=plan,
            epoch=plan.epoch + 1,
            switch=self.switch,
        )
