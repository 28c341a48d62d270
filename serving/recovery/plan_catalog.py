"""The plan for every set of ranks of a server. All are derived from the base plan, so who is alive alone decides where
an expert sits."""

from collections.abc import Collection, Iterable

from planner.cluster import Cluster, Device
from planner.errors import NoFeasiblePlan, PlannerError
from planner.lattice import Lattice, build_lattice, extended
from planner.plan import Plan
from planner.solve import solve
from serving.config import Settings
from serving.errors import NoCapacity, StartError
from serving.mesh_key import MeshKey
from serving.places import at_home
from serving.prepared import Prepared
from serving.rank_process import Home
from serving.roles import roles

SHORT_TOKENS, CHEAP_BYTES = 256, 128 << 20
"""A short request, prompt and answer, and what of a rank's memory its cache may take in any case."""


class Plans:
    """Foreseen or made when asked for. `cluster` says where each rank is, or was last. Raises StartError when they
    cannot serve even if all are alive."""

    def __init__(self, settings: Settings, model: Prepared, cluster: Cluster) -> None:
        self._switch = settings.role_switch
        self.cluster = cluster
        self.workload = model.workload(settings.page_size)
        try:
            self.base = solve(
                self.workload,
                cluster,
                slots_per_rank=settings.slots_per_rank,
                survive_ranks=min(settings.survive, settings.ranks - 1),
                pages_per_rank=pages_per_rank(settings, model.max_context, model.cache_bytes_per_token),
                roles=roles(settings, self.workload, cluster),
                tensor=settings.tensor,
            )
        except PlannerError as error:
            raise StartError(str(error)) from None
        depth = min(settings.lattice_depth, settings.ranks - 1)
        self._lattice: Lattice = build_lattice(self.workload, cluster, self.base, depth=depth, switch=self._switch)

    def of(self, alive: Collection[int]) -> Plan:
        """The plan for these ranks. Raises NoCapacity, saying what is missing."""
        alive = tuple(sorted(alive))
        if not alive:
            raise NoCapacity("no rank is alive. Requests wait until one is back.")
        if alive == self.base.rank_ids:
            return self.base
        plan = self.foreseen(alive)
        if plan is not None:
            return plan
        try:
            return solve(self.workload, self.cluster, alive=alive, previous=self.base, switch=self._switch)
        except NoFeasiblePlan as error:
            raise NoCapacity(str(error)) from None

    def warnings(self) -> list[str]:
        """What whoever starts the server should know of its plan."""
        idle = [r.id for r in self.base.ranks if r.group < 0] if dict(self.base.axes)["tensor"] > 1 else []
        said = [f"ranks {idle} are in no tensor group: they hold experts only"] if idle else []
        alone = [min(dead) for dead in self._lattice.infeasible if len(dead) == 1]
        return said + ([f"without any one of ranks {alone} requests wait for its replacement"] if alone else [])

    def foreseen(self, alive: Collection[int]) -> Plan | None:
        """The plan of the lattice for these ranks, if there is one."""
        return self._lattice.get(frozenset(self.base.rank_ids) - frozenset(alive))

    def meshes_below(self, alive: Collection[int], depth: int) -> list[MeshKey]:
        """The meshes after each foreseen loss among `alive`, the likeliest first."""
        gone = frozenset(self.base.rank_ids) - frozenset(alive)
        hosts = {frozenset(ids).intersection(alive) for ids in self.cluster.domains("host").values()}
        keys = [
            MeshKey.of(plan)
            for dead, plan in self._lattice.plans.items()
            if gone < dead and (len(dead) - len(gone) <= depth or dead - gone in hosts)
        ]
        return sorted(dict.fromkeys(keys), key=lambda key: -len(key.ranks))

    def place_of(self, rank: int) -> Device:
        """The host and the rack that a rank is in, or was last."""
        return self.cluster.alive([rank])[0]

    def move(self, rank: int, home: Home) -> None:
        """A rank is on another host from now on: the loss of that host is foreseen too."""
        self.cluster = at_home(self.cluster, rank, home)
        self.foresee(map(frozenset, self.cluster.domains("host").values()))

    def foresee(self, losses: Iterable[frozenset[int]]) -> None:
        """Have plans for these losses too."""
        self._lattice = extended(self._lattice, self.workload, self.cluster, losses, switch=self._switch)


def pages_per_rank(settings: Settings, max_context: int, bytes_per_token: int) -> int:
    """Pages of a rank's cache: as set; or two contexts' worth, and more while that is cheap, until a short request has
    room in every row of a step."""
    rows = max(decode for decode, _ in settings.buckets)
    tokens = min(rows * SHORT_TOKENS, CHEAP_BYTES // bytes_per_token)
    return settings.pages_per_rank or max(2 * -(-max_context // settings.page_size), tokens // settings.page_size)
