"""Events of the ranks of a server, and the effects that they require at once, as values.

An event has happened; an effect is an action that the shell must take before anything else.
`serving.recovery.transitions` leads from one to the other.
"""

from dataclasses import dataclass

from planner.plan.plan import Plan
from serving.executor.incarnation import Loss
from serving.executor.mesh_key import MeshKey
from serving.protocol.events import EventKind
from serving.protocol.weights import WeightsVersion
from serving.recovery.membership import Leaving

# -- Events of ranks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Starting:
    """The process of a rank is being started."""

    rank: int


@dataclass(frozen=True)
class StartAbandoned:
    """The process of a rank is started no more."""

    rank: int


@dataclass(frozen=True)
class Ready:
    """A rank is configured."""

    rank: int


@dataclass(frozen=True)
class JoinBegan:
    """Every READY rank enters the running generation."""


@dataclass(frozen=True)
class Joined:
    """A rank has entered the running generation and filled `slots` slots on each layer."""

    rank: int
    slots: int


@dataclass(frozen=True)
class Lost:
    """A rank died or was declared dead."""

    loss: Loss


@dataclass(frozen=True)
class LeaveRequested:
    """A rank is to leave once its requests have moved."""

    rank: int
    leaving: Leaving


@dataclass(frozen=True)
class LeaveRefused:
    """A rank cannot leave."""

    rank: int


@dataclass(frozen=True)
class Released:
    """A rank that was LEAVING has left the plan in force."""

    rank: int


@dataclass(frozen=True)
class TakenOut:
    """A rank is not to be replaced when it is lost."""

    rank: int


@dataclass(frozen=True)
class Wanted:
    """A rank is to be started when it has no process, one that was taken out too."""

    rank: int


# -- Events of generations, plans and meshes ----------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A rank of an earlier front has been in this generation and has adopted this epoch."""

    generation: int
    epoch: int


@dataclass(frozen=True)
class GenerationOpened:
    """A new generation of these ranks is being formed; they have all answered that they can enter it."""

    number: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Activated:
    """The ranks of the generation run their plan, and can exchange."""


@dataclass(frozen=True)
class GenerationFailed:
    """The ranks that were to enter a new generation could not."""


@dataclass(frozen=True)
class CommBroken:
    """The communicators of this generation cannot be trusted any more."""


@dataclass(frozen=True)
class ExchangeFailed:
    """An exchange between the ranks of the plan failed, and none of them is lost."""


@dataclass(frozen=True)
class AdoptionBegan:
    """The ranks are asked to adopt a plan, whose epoch is used by it alone."""

    plan: Plan


@dataclass(frozen=True)
class Adopted:
    """A plan is in force, which is a part of the desired one."""

    plan: Plan
    desired: Plan


@dataclass(frozen=True)
class WeightsDecided:
    """Every rank has these weights in host memory, and the decision for them is on disk: every plan from now on has
    them."""

    version: WeightsVersion


@dataclass(frozen=True)
class PartPlanned:
    """The next part of the desired plan that can be loaded beside the steps; None when there is none."""

    part: Plan | None


@dataclass(frozen=True)
class Suspended:
    """No plan is possible: these ranks, and those on their way, wait for others and a new generation."""

    ranks: frozenset[int]
    reason: str


@dataclass(frozen=True)
class InvalidatedTaken:
    """The engine's state knows which caches were dropped."""


@dataclass(frozen=True)
class MeshLoaded:
    """The executables of a mesh are loaded on its ranks."""

    mesh: MeshKey


@dataclass(frozen=True)
class ConnectBegan:
    """A loaded mesh is being connected, or dropped."""

    mesh: MeshKey


@dataclass(frozen=True)
class MeshConnected:
    """The ranks of a mesh can exchange in it."""

    mesh: MeshKey


@dataclass(frozen=True)
class LoadedDropped:
    """The meshes that wait to be connected are not wanted any more."""


@dataclass(frozen=True)
class ServiceLost:
    """Ranks had to leave the coordination service."""


Event = (
    Starting
    | StartAbandoned
    | Ready
    | JoinBegan
    | Joined
    | Lost
    | LeaveRequested
    | LeaveRefused
    | Released
    | TakenOut
    | Wanted
    | Seen
    | GenerationOpened
    | Activated
    | GenerationFailed
    | CommBroken
    | ExchangeFailed
    | AdoptionBegan
    | Adopted
    | WeightsDecided
    | PartPlanned
    | Suspended
    | InvalidatedTaken
    | MeshLoaded
    | ConnectBegan
    | MeshConnected
    | LoadedDropped
    | ServiceLost
)

# -- Effects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropCache:
    """The KV cache of a rank is invalid: its replica takes no more entries of it."""

    rank: int


@dataclass(frozen=True)
class DropRank:
    """A rank is lost: drop its process id, its parity, and all else that is kept of its process."""

    rank: int


@dataclass(frozen=True)
class DropParity:
    """The parity of experts is that of weights which are going out of force."""


@dataclass(frozen=True)
class ReportWeights:
    """Report to operators that other weights have come into force, and after how many seconds without a step."""

    version: WeightsVersion
    seconds: float


@dataclass(frozen=True)
class Report:
    """Emit an event to operators."""

    kind: EventKind
    rank: int
    cause: str


Effect = DropCache | DropRank | DropParity | ReportWeights | Report
