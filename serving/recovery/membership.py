"""The ranks of a server as one value: their states, the plan in force, and the meshes they can use.

`serving.recovery.transitions.on` is the only code that makes another value of one.
"""

import dataclasses
import enum
from collections.abc import Mapping

from planner.plan.plan import Plan
from serving.executor.incarnation import Loss
from serving.executor.mesh_key import MeshKey
from serving.protocol.weights import FIRST_WEIGHTS, WeightsVersion


class RankState(enum.Enum):
    """The states of a rank. A replacement passes STARTING, READY, JOINING and JOINED before it is SERVING; where a new
    generation is made it goes from JOINING to SERVING at once."""

    STARTING = enum.auto()
    """Its process is being started and configured."""
    READY = enum.auto()
    """It is configured and waits to enter a generation."""
    JOINING = enum.auto()
    """It is entering a generation."""
    JOINED = enum.auto()
    """It is in the generation, its slots are filled, and the plan in force does not use it yet."""
    SERVING = enum.auto()
    """The plan in force uses it."""
    LEAVING = enum.auto()
    """The plan in force uses it until its requests have moved to other ranks."""
    LOST = enum.auto()
    """It has no process, or one that was declared dead; the plan in force may still have it."""
    OUT = enum.auto()
    """It was taken out, and is not replaced before an operator scales up."""


INCOMING = frozenset({RankState.READY, RankState.JOINING, RankState.JOINED})
"""The states of a rank that is configured and not in the plan in force."""


@dataclasses.dataclass(frozen=True)
class Leaving:
    """A rank that is LEAVING. After `until` (on the front's clock) its requests do not wait any more for room on other
    ranks."""

    cause: str
    replace: bool
    until: float
    asked_at: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """The ranks of a server between two events."""

    restart: bool = True
    """Whether a rank that was lost is replaced."""
    epoch: int = -1
    """The number of the plan whose adoption began last."""
    generation: int = 0
    """The number of process groups that the ranks have formed."""
    comm_broken: bool = False
    """True when the communicators of this generation cannot be trusted: a new generation is needed."""
    exchange_failed: bool = False
    """True when an exchange between ranks that live has failed, and the mesh of the plan is to be connected again."""
    service_lost: bool = False
    """True when ranks had to leave the coordination service: this generation can connect no other mesh."""
    plan: Plan | None = None
    """The plan in force; lost ranks stay in it until another one is adopted."""
    no_plan_reason: str = ""
    """Why no plan is in force."""
    desired: Plan | None = None
    """The plan that the serving ranks converge to."""
    next_part: Plan | None = None
    """The next part of the desired plan that the ranks can load beside the steps, if there is one."""
    weights: WeightsVersion = FIRST_WEIGHTS
    """The weights of the plan in force."""
    next_weights: WeightsVersion = FIRST_WEIGHTS
    """The weights of every plan whose adoption begins from now on."""
    adopting_weights: WeightsVersion = FIRST_WEIGHTS
    """The weights of the plan whose adoption began last."""
    adopting_since: float = 0.0
    """When that adoption began."""
    states: Mapping[int, RankState] = dataclasses.field(default_factory=dict[int, RankState])
    """STARTING, READY, JOINING, JOINED and OUT, by rank: `state` has the state of every rank."""
    losses: Mapping[int, Loss] = dataclasses.field(default_factory=dict[int, Loss])
    """The lost ranks that the plan in force still has."""
    leaving: Mapping[int, Leaving] = dataclasses.field(default_factory=dict[int, Leaving])
    joined_slots: Mapping[int, int] = dataclasses.field(default_factory=dict[int, int])
    """Slots that a JOINED rank has filled on each layer."""
    suspended: frozenset[int] = frozenset()
    """The ranks that served until no plan was possible, and wait for others."""
    wanted: frozenset[int] = frozenset()
    """The ranks that are to be started once no recovery is under way."""
    ready_since: float | None = None
    """When the first of the READY ranks became so."""
    groups: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict[int, tuple[int, ...]])
    """The tensor group of each attention rank, under the plan whose adoption began last."""
    invalidated: frozenset[int] = frozenset()
    """Ranks that were asked to drop their KV cache since the engine's state was last made that of the plan."""
    connected: frozenset[MeshKey] = frozenset()
    loaded: tuple[MeshKey, ...] = ()
    """Meshes whose executables are loaded and whose communicator is not connected yet, in the order to connect."""

    @property
    def plan_ranks(self) -> tuple[int, ...]:
        """The ranks of the plan in force, lost ones among them."""
        return self.plan.rank_ids if self.plan is not None else ()

    @property
    def ready(self) -> frozenset[int]:
        """The ranks that wait to enter a generation."""
        return self.in_state(RankState.READY)

    @property
    def joining(self) -> frozenset[int]:
        """The ranks that are entering a generation."""
        return self.in_state(RankState.JOINING)

    @property
    def joined(self) -> frozenset[int]:
        """The ranks in the generation that the plan in force does not use yet."""
        return self.in_state(RankState.JOINED)

    @property
    def starting(self) -> frozenset[int]:
        """The ranks whose processes are being started."""
        return self.in_state(RankState.STARTING)

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of the plan once it uses the JOINED ranks, in order."""
        return tuple(sorted({*self.plan_ranks, *self.joined}))

    def state(self, rank: int) -> RankState:
        """The state of a rank."""
        if self.plan is not None and rank in self.plan.rank_ids:
            if rank in self.losses:
                return RankState.LOST
            return RankState.LEAVING if rank in self.leaving else RankState.SERVING
        return self.states.get(rank, RankState.LOST)

    def in_state(self, state: RankState) -> frozenset[int]:
        """The ranks that are not in the plan in force and have this state."""
        return frozenset(rank for rank, its in self.states.items() if its is state)

    def is_incoming(self, rank: int) -> bool:
        """Whether a rank is being started or joins."""
        return self.states.get(rank) in {*INCOMING, RankState.STARTING}

    def can_start(self, rank: int) -> bool:
        """Whether a process of this rank may be started: it has none, and the plan in force does not count on it. A
        LEAVING rank has one until it is released."""
        return rank not in self.plan_ranks and rank not in self.leaving and not self.is_incoming(rank)

    def is_out(self, rank: int) -> bool:
        """Whether a rank was taken out; it may serve still."""
        return self.states.get(rank) is RankState.OUT
