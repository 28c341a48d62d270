"""The plan for every set of ranks of a server. All are derived from the base plan: the set of ranks alone decides on
which rank an expert is."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from planner.cost.throughput import assess
from planner.errors import NoFeasiblePlan, PlannerError
from planner.inputs.cluster import Cluster, Device
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.plan import Plan
from planner.solver.balance import rank_loads
from planner.solver.lattice import Lattice, build_lattice, extend_lattice
from planner.solver.problem import Problem
from planner.solver.rebalance import rebalance
from planner.solver.shapes import mesh_shapes
from planner.solver.solve import solve
from serving.config import MeshSettings, Settings
from serving.errors import InvalidRequest, NoCapacity, StartError
from serving.executor.mesh_key import MeshKey
from serving.launch.host_pool import with_rank_moved
from serving.launch.rank_process import HostPaths
from serving.protocol.prepared_model import PreparedModel

SHORT_REQUEST_TOKENS, MIN_CACHE_BYTES = 256, 128 << 20
"""Tokens of a short request, prompt and answer; and bytes of memory that the KV cache of a rank may take in any
case."""


@dataclass(frozen=True)
class Rebalanced:
    """The plans of a catalog with experts moved towards a load: the base plan and those of losses, the share of the
    hottest rank before and after (see `hottest_share`), the number of slots that change, and the problem that the plans
    solve."""

    base: Plan
    lattice: Lattice
    before: float
    after: float
    moved: int
    problem: Problem


def hottest_share(plan: Plan, load: np.ndarray) -> float:
    """Tokens of the hottest rank of each layer over the mean of its ranks, all layers together; 1 is even. Ranks of a
    layer wait for the hottest. `load` is tokens `[moe layers, experts]`."""
    by_rank = rank_loads(plan.slots_by_rank(), load)
    return float(by_rank.max(axis=1).sum() / by_rank.mean(axis=1).sum()) if by_rank.any() else 1.0


class PlanCatalog:
    """The plans of one server. Those for likely losses (the lattice) are solved at the start, others when they are
    asked for. `cluster` has the host of each rank. Raises StartError when the ranks cannot serve even if all are
    alive."""

    def __init__(
        self, settings: Settings, model: PreparedModel, cluster: Cluster, placement: Path | None = None
    ) -> None:
        self.placement = placement
        """The file from which the next front reads the base plan, where experts have moved."""
        workload = model.workload(settings.page_size)
        try:
            self._problem = Problem(
                workload=workload,
                cluster=cluster,
                slots_per_rank=settings.slots_per_rank,
                survive_ranks=min(settings.survive, settings.ranks - 1),
                pages_per_rank=pages_per_rank(settings, model.max_context, model.cache_bytes_per_token),
                roles=rank_roles(settings, workload, cluster),
                switch=settings.role_switch,
                tensor=settings.tensor,
            )
            self.base = solve(self._problem)
        except PlannerError as error:
            raise StartError(str(error)) from None
        depth = min(settings.lattice_depth, settings.ranks - 1)
        self._lattice: Lattice = build_lattice(self._problem, self.base, depth=depth)

    @classmethod
    def of_server(
        cls,
        settings: Settings,
        model: PreparedModel,
        cluster: Cluster | None,
        placement: Path | None,
        log: Callable[[str], None],
    ) -> Self:
        """The plans of a server; all its ranks run on the front's host when `cluster` is None. Their base plan is the
        one that an earlier front wrote to `placement`, if it did. Raises StartError also when that file is no plan."""
        hosts = [settings.host_of(rank) for rank in range(settings.ranks)]
        plans = cls(settings, model, cluster or Cluster.local(settings.ranks, hosts=hosts), placement)
        if placement is None or not placement.exists():
            return plans
        try:
            taken = plans.place(Plan.from_json(placement.read_text()))
        except (OSError, PlannerError) as error:
            raise StartError(f"the placement in {placement} cannot be read: {error} Remove the file.") from None
        if not taken:
            log("the placement of an earlier front is not one of these ranks and this model: it is not used")
        return plans

    @property
    def workload(self) -> Workload:
        """The model in numbers."""
        return self._problem.workload

    @property
    def cluster(self) -> Cluster:
        """The host of each rank, or its last one."""
        return self._problem.cluster

    def of(self, alive: Collection[int]) -> Plan:
        """The plan for these ranks. Raises NoCapacity, which says what is missing."""
        alive = tuple(sorted(alive))
        if not alive:
            raise NoCapacity("no rank is alive. Accepted requests wait until one is back.")
        if alive == self.base.rank_ids:
            return self.base
        plan = self.in_lattice(alive)
        if plan is not None:
            return plan
        try:
            return solve(self._problem.after_loss(self.base, alive))
        except NoFeasiblePlan as error:
            raise NoCapacity(str(error)) from None

    def why_infeasible(self, ranks: Collection[int]) -> str:
        """Why these ranks cannot serve without the others; "" if they can."""
        try:
            self.of(ranks)
        except NoCapacity as error:
            return str(error)
        return ""

    def warnings(self) -> list[str]:
        """Warnings about the base plan for whoever starts the server."""
        idle = [r.id for r in self.base.ranks if r.group < 0] if dict(self.base.axes)["tensor"] > 1 else []
        warnings = [f"ranks {idle} are in no tensor group: they hold experts only"] if idle else []
        alone = [min(dead) for dead in self._lattice.infeasible if len(dead) == 1]
        return warnings + ([f"without any one of ranks {alone} requests wait for its replacement"] if alone else [])

    def in_lattice(self, alive: Collection[int]) -> Plan | None:
        """The plan of the lattice for these ranks, if there is one."""
        return self._lattice.get(frozenset(self.base.rank_ids) - frozenset(alive))

    def meshes_after_losses(self, alive: Collection[int], depth: int) -> list[MeshKey]:
        """The meshes after each loss of up to `depth` of these ranks, or of a host, that has a plan in the lattice;
        those with the most ranks first."""
        gone = frozenset(self.base.rank_ids) - frozenset(alive)
        hosts = {frozenset(ids).intersection(alive) for ids in self.cluster.domains("host").values()}
        keys = [
            MeshKey.of(plan)
            for dead, plan in self._lattice.plans.items()
            if gone < dead and (len(dead) - len(gone) <= depth or dead - gone in hosts)
        ]
        return sorted(dict.fromkeys(keys), key=lambda key: -len(key.ranks))

    def device_of(self, rank: int) -> Device:
        """The host and the rack of a rank, or its last ones."""
        return self.cluster.alive([rank])[0]

    def rebalanced(self, load: np.ndarray) -> "Rebalanced":
        """The catalog's plans with experts moved towards a measured load, tokens `[moe layers, experts]`; nothing is
        changed. Raises NoCapacity when they would survive less, or need meshes that were not prepared. Slow on many
        ranks: it solves every planned loss."""
        balanced = rebalance(self.base, load, copies=max(2, self._problem.survive_ranks + 1))
        base = replace(balanced.plan, epoch=self.base.epoch)
        lattice = self._lattice_of(base)
        lost = self._lattice.plans.keys() - lattice.plans.keys()
        if lost:
            raise NoCapacity(f"balanced, the loss of ranks {sorted(min(lost, key=sorted))} would not be survived.")
        prepared = {MeshKey.of(plan) for plan in self._lattice.plans.values()}
        if not prepared.issuperset(map(MeshKey.of, lattice.plans.values())):
            raise NoCapacity("balanced, a loss would need a mesh that is not prepared.")
        hottest = (hottest_share(plan, load) for plan in (self.base, base))
        return Rebalanced(base, lattice, *hottest, moved=balanced.moved, problem=self._problem)

    def _lattice_of(self, base: Plan) -> Lattice:
        """Plans for the losses that are planned for now, derived from another base plan."""
        return extend_lattice(Lattice(plan=base, plans={}), self._problem, self._lattice.plans)

    def are_those_of(self, rebalanced: "Rebalanced") -> bool:
        """Whether ranks are on the hosts for which these plans were made."""
        return rebalanced.problem is self._problem

    def adopt(self, rebalanced: "Rebalanced") -> None:
        """Use these plans from now on."""
        self.base, self._lattice = rebalanced.base, rebalanced.lattice

    def place(self, base: Plan) -> bool:
        """Use the base plan of an earlier front; False when it is not one of these ranks and this model."""
        mine = self.base
        same = (base.ranks, base.slots_per_rank, base.moe_layers, base.experts, base.pages_per_rank, base.parity) == (
            *(mine.ranks, mine.slots_per_rank, mine.moe_layers, mine.experts, mine.pages_per_rank, mine.parity),
        )
        if same:
            self.base = base
            self._lattice = self._lattice_of(base)
        return same

    def move(self, rank: int, host_paths: HostPaths) -> None:
        """A rank is on another host from now on. Plans for the loss of each host are added to the lattice."""
        self._problem = replace(self._problem, cluster=with_rank_moved(self.cluster, rank, host_paths))
        self.prepare_losses(map(frozenset, self.cluster.domains("host").values()))

    def prepare_losses(self, losses: Iterable[frozenset[int]]) -> None:
        """Add plans for these losses to the lattice."""
        self._lattice = extend_lattice(self._lattice, self._problem, losses)


def pages_per_rank(settings: Settings, max_context: int, bytes_per_token: int) -> int:
    """Pages of a rank's KV cache: as set; else enough for two contexts of full length, or for a short request in every
    row of a step where that takes no more than MIN_CACHE_BYTES."""
    rows = max(decode for decode, _ in settings.buckets)
    tokens = min(rows * SHORT_REQUEST_TOKENS, MIN_CACHE_BYTES // bytes_per_token)
    return settings.pages_per_rank or max(2 * -(-max_context // settings.page_size), tokens // settings.page_size)


def check_arch(workload: Workload, arch: str) -> None:
    """Raise InvalidRequest for ranks with roles of a model whose layers they cannot share so."""
    if arch != "disaggregated":
        return
    if workload.state_bytes:
        raise InvalidRequest(
            f"{workload.name} has layers whose context is a state, which attention ranks of their own do not keep yet. "
            "Leave arch out.",
            param="arch",
        )
    if not workload.experts:
        raise InvalidRequest(
            f"{workload.name} has no experts that ranks of their own could hold. Leave arch out.", param="arch"
        )


def rank_roles(settings: MeshSettings, workload: Workload, cluster: Cluster) -> dict[int, str] | None:
    """The role of each rank, attention ranks first; None for collocated ranks.

    A number of attention or expert ranks that the settings leave open is the one with the most predicted tokens per
    second, among the numbers that keep an expert rank after `survive` losses. Raises InvalidRequest for a model without
    experts.
    """
    if settings.arch == "collocated":
        return None
    check_arch(workload, settings.arch)
    attention = settings.attention
    if attention is None and settings.experts is not None:
        attention = settings.ranks - settings.experts
    if attention is None:
        attention = _best_attention_count(settings, workload, cluster)
    return {rank: "attention" if rank < attention else "expert" for rank in range(settings.ranks)}


def _best_attention_count(settings: MeshSettings, workload: Workload, cluster: Cluster) -> int:
    fitting = []
    for shape in mesh_shapes(workload, cluster, cluster.devices, arch="disaggregated", slots=settings.slots_per_rank):
        candidate = assess(workload, cluster, shape, Traffic())
        if shape.tensor == shape.dense == 1 and not candidate.reason:
            kept = shape.expert_rank_count > min(settings.survive, settings.ranks - 2)
            fitting.append((kept, candidate.tokens_per_second, shape.data))
    return max(fitting)[2] if fitting else max(1, settings.ranks // 2)
